"""Many requests on one session: who gets a row, whose turn it is. Knows token ids, no text.

    submit ──▶ waiting ──▶ prompt, a chunk a turn ──▶ running, a token a turn ──▶ End

One turn of the loop reads one chunk of one prompt and then decodes one token of every running
row. So nobody waits for more than one chunk between two tokens, and a prompt is read whatever the
others do. Requests are served in the order in which they came.

`runtime/scheduling/batch.py` sees to it that a request's logits are the same in bits whoever
else is there.
"""

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic, perf_counter
from typing import Literal, Protocol

import numpy as np

from graphs.errors import MistralcError
from runtime.backends.session import Session
from runtime.decoding.ring import Ring
from runtime.decoding.sampling import Floats, Sampled, Sampler, SamplingParams
from runtime.scheduling.batch import Batch
from runtime.scheduling.prefix_cache import PrefixStore

PREFIX_BYTES = 1 << 29  # of prompts' chunks kept in memory: 11,000 tokens of SmolLM2, 4,000 of 7B


class Constraint(Protocol):
    """What a text has to look like, token by token."""

    def mask(self, logits: Floats) -> None:
        """Set the logits [V] of tokens that may not come next to -inf, in place."""

    def accept(self, token_id: int) -> bool:
        """Note the token; True when the text is complete and only a stop may follow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt and how to go on from it; ends with one of `stop_ids`, which is delivered too."""

    ids: tuple[int, ...]
    params: SamplingParams
    max_new_tokens: int | None = None
    stop_ids: frozenset[int] = frozenset()
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a request ended. `cached_tokens` of its prompt did not have to be computed."""

    reason: Literal["stop", "length", "cancelled", "error"]
    cached_tokens: int
    error: Exception | None = None


Deliver = Callable[[Sampled | End], None]


class Ticket:
    """A request on its way; what it holds beside `request` and `started` is the scheduler's.

    `started` is when it got its row, in `perf_counter`'s seconds; None while it waits.
    """

    def __init__(self, request: Request, deliver: Deliver) -> None:
        self.request = request
        self.started: float | None = None
        self._deliver = deliver
        self._cancelled = False
        self._row = -1
        self._cached = 0
        self._sampler: Sampler
        self._left: int | None = None  # tokens that may still come
        self._token = -1  # the last, which is not in the ring yet


class QueueFullError(MistralcError):
    """As many requests are waiting as may."""


class StoppedError(MistralcError):
    """The scheduler takes no more requests: it is draining, closed, or its backend failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Where the scheduler stands. Totals count from its start.

    `positions` are the rows' next positions and `capacity` the slots of the largest ring.
    `fault` is what the backend said when it failed, after which nothing is served.
    """

    rows: int
    running: int
    waiting: int
    positions: tuple[int, ...]
    capacity: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    steps: int
    fault: str | None = None


class Scheduler:
    """Serves requests on the rows of a session, which belongs to it from now on.

    `prefix_bytes` of prompts' chunks are kept in memory beside the ring, for prompts that begin
    like one before. `chunk` is that of `Batch`.
    """

    def __init__(
        self,
        session: Session,
        ring: Ring,
        vocab_size: int,
        *,
        max_waiting: int = 256,
        prefix_bytes: int = PREFIX_BYTES,
        chunk: int | None = None,
    ) -> None:
        self._batch = Batch(session, ring, vocab_size, PrefixStore(prefix_bytes), chunk)
        self._max_waiting = max_waiting
        self._wake = threading.Condition()  # guards all that follows but what the loop alone uses
        self._waiting: deque[Ticket] = deque()
        self._stopping = self._closed = False
        self._in_turn = False  # Ends may still be on their way
        self._fault: Exception | None = None
        self._thread: threading.Thread | None = None
        self._reading: Ticket | None = None  # whose prompt is being read
        self._running: dict[int, Ticket] = {}  # by row
        self._scores = np.empty(vocab_size, np.float32)
        self._prompt = self._cached = self._generated = self._steps = 0

    # From any thread

    def submit(self, request: Request, deliver: Deliver) -> Ticket:
        """Queue a request. `deliver` gets each token and at last an End, on the loop's thread.

        It must not wait for anything: everyone would wait with it. Raises ContextFullError when
        the prompt does not fit, QueueFullError and StoppedError when nothing is taken now,
        MistralcError for tokens that are not this model's.
        """
        self._batch.check(request.ids)
        self._batch.check_ids(request.params.logit_bias)
        ticket = Ticket(request, deliver)
        with self._wake:
            if self._fault is not None:
                raise StoppedError(
                    f"The backend has failed ({self._fault}) and nothing is served. Start again."
                )
            if self._stopping:
                raise StoppedError("This server is about to end. Send the request to another.")
            if len(self._waiting) >= self._max_waiting:
                raise QueueFullError(
                    f"{len(self._waiting)} requests are waiting, and no more may. Try again later."
                )
            self._waiting.append(ticket)
            self._wake.notify_all()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a request, if it has not ended yet: it is delivered End("cancelled")."""
        ticket._cancelled = True  # seen at the beginning of the next turn

    def stats(self) -> Stats:
        """Where things stand now."""
        ring = self._batch.ring
        with self._wake:
            return Stats(
                rows=len(ring.positions),
                running=len(self._running) + (self._reading is not None),
                waiting=len(self._waiting),
                positions=tuple(ring.positions),
                capacity=max(ring.full.values()),
                prompt_tokens=self._prompt,
                cached_tokens=self._cached,
                generated_tokens=self._generated,
                steps=self._steps,
                fault=None if self._fault is None else str(self._fault),
            )

    def start(self) -> None:
        """Run the loop in a thread of its own."""
        self._thread = threading.Thread(target=self._loop, name="scheduler", daemon=True)
        self._thread.start()

    def drain(self, seconds: float) -> bool:
        """Take nothing new; True when all that is running and waiting ended within `seconds`.

        Else the rest is cancelled.
        """
        deadline = monotonic() + seconds
        with self._wake:
            self._stopping = True
            while (busy := self._busy() or self._in_turn) and (left := deadline - monotonic()) > 0:
                self._wake.wait(left)
            if not busy:
                return True
        self.close()
        return False

    def close(self) -> None:
        """Cancel what there is and end the loop; may be called twice."""
        with self._wake:
            self._stopping = self._closed = True
            self._wake.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        elif self._thread is None:
            self._end_all("cancelled")

    # On the loop's thread

    def turn(self) -> bool:
        """One turn of the loop, for those who have not started it; False when all is done."""
        with self._wake:
            self._in_turn = True
        try:
            self._drop_cancelled()
            self._read_a_chunk()
            self._decode()
        except Exception as error:  # the backend's: a request's own are met where they arise
            with self._wake:
                self._fault, self._stopping = error, True
            self._end_all("error", error)
        with self._wake:
            self._in_turn = False
            if not self._busy():
                self._wake.notify_all()
                return False
        return True

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not self._closed and not self._busy():
                    self._wake.wait()
                if self._closed:
                    break
            self.turn()
        self._end_all("cancelled")

    def _busy(self) -> bool:
        return bool(self._waiting or self._running or self._reading)

    def _drop_cancelled(self) -> None:
        with self._wake:
            gone = [ticket for ticket in self._waiting if ticket._cancelled]
            for ticket in gone:
                self._waiting.remove(ticket)
        served = [*self._running.values(), *([self._reading] if self._reading else [])]
        for ticket in (*gone, *(ticket for ticket in served if ticket._cancelled)):
            self._end(ticket, "cancelled")

    def _read_a_chunk(self) -> None:
        """Go on with the prompt at hand, or begin with the next that waits if a row is free."""
        if (ticket := self._reading) is None:
            with self._wake:
                if not self._waiting or not self._batch.room():
                    return
                ticket = self._waiting.popleft()
                self._reading = ticket
            if not self._begin(ticket):
                return
        logits = self._batch.prefill(ticket._row)
        if logits is not None:
            self._reading = None
            self._running[ticket._row] = ticket
            self._sample(ticket, logits)

    def _begin(self, ticket: Ticket) -> bool:
        """Give the request a row; False when it has ended already."""
        request = ticket.request
        ids, limit = request.ids, request.max_new_tokens
        room = self._batch.ring.limits.context - len(ids)
        if not self._batch.ring.spec.slides:  # the last token needs no place of its own
            limit = room + 1 if limit is None else min(limit, room + 1)
        ticket._left = limit
        if limit is not None and limit < 1:
            self._end(ticket, "length")
            return False
        ticket._sampler = Sampler(request.params, self._batch.vocab_size, ids)
        ticket._row, ticket._cached = self._batch.claim(ids)
        ticket.started = perf_counter()
        self._prompt += len(ids)
        self._cached += ticket._cached
        return True

    def _decode(self) -> None:
        if not self._running:
            return
        tickets = dict(self._running)
        logits = self._batch.decode({row: ticket._token for row, ticket in tickets.items()})
        self._steps += 1
        for row, ticket in tickets.items():
            self._sample(ticket, logits[row])

    def _sample(self, ticket: Ticket, logits: Floats) -> None:
        """Choose and deliver a request's next token, and end it if that was the last."""
        request, sampler = ticket.request, ticket._sampler
        try:
            if request.constraint is not None:
                np.copyto(self._scores, logits)
                request.constraint.mask(self._scores)
                logits = self._scores
            sampled = sampler.sample(logits)
            token, stopped = sampled.token_id, sampled.token_id in request.stop_ids
            if request.constraint is not None and not stopped:
                stopped = request.constraint.accept(token)
            self._generated += 1
            ticket._deliver(sampled)
        except Exception as error:
            self._end(ticket, "error", error)
            return
        ticket._token = token
        if ticket._left is not None:
            ticket._left -= 1
        if stopped:
            self._end(ticket, "stop")
        elif ticket._left == 0:
            self._end(ticket, "length")

    def _end(
        self,
        ticket: Ticket,
        reason: Literal["stop", "length", "cancelled", "error"],
        error: Exception | None = None,
    ) -> None:
        """Take the request's row back and deliver its End, whatever its receiver does."""
        if self._reading is ticket:
            self._reading = None
        if self._running.get(ticket._row) is ticket:
            del self._running[ticket._row]
        if ticket._row >= 0:
            self._batch.release(ticket._row)
        with suppress(Exception):
            ticket._deliver(End(reason=reason, cached_tokens=ticket._cached, error=error))

    def _end_all(
        self, reason: Literal["cancelled", "error"], error: Exception | None = None
    ) -> None:
        with self._wake:
            waiting = list(self._waiting)
            self._waiting.clear()
        reading = [] if self._reading is None else [self._reading]
        for ticket in (*self._running.copy().values(), *reading, *waiting):
            self._end(ticket, reason, error)
