"""Serve many requests on one session: who gets a row, whose turn it is. Knows nothing about text.

    submit ──▶ waiting ──▶ prompt, a chunk a turn ──▶ running, a token a turn ──▶ End

One turn of the loop reads one chunk of one prompt and then decodes one token of every running
row. So no row waits for more than one chunk between two tokens, and running rows never stop a
prompt from being read. Requests are served in the order in which they came.

`runtime/scheduling/batch.py` makes a request's logits bit-identical whoever else is there.
"""

import threading
from collections import deque
from contextlib import suppress
from time import monotonic, perf_counter
from typing import Protocol, Self

import numpy as np

from runtime.backends.session import Session
from runtime.decoding.ring import Ring
from runtime.decoding.sampling import Floats, Sampler
from runtime.scheduling.batch import Batch
from runtime.scheduling.prefix_cache import PREFIX_BYTES, PrefixCache
from runtime.scheduling.request import (
    Deliver,
    End,
    EndReason,
    QueueFullError,
    Request,
    Stats,
    StoppedError,
    Ticket,
)

MAX_WAITING = 256  # requests


class Loaded(Protocol):
    """The parts of a `runtime.load.Loaded` that a scheduler takes over."""

    @property
    def session(self) -> Session:
        """The session, with as many rows as the ring."""

    @property
    def ring(self) -> Ring:
        """The ring, at position 0 in all rows."""


class Scheduler:
    """Serves requests on the rows of a session. Nothing else may use session or ring meanwhile.

    Up to `max_waiting` requests wait for a row. Up to `prefix_bytes` of prompt chunks are kept in
    memory beside the ring, for prompts that begin alike. `chunk` is passed to `Batch`.
    """

    def __init__(
        self,
        session: Session,
        ring: Ring,
        *,
        max_waiting: int = MAX_WAITING,
        prefix_bytes: int = PREFIX_BYTES,
        chunk: int | None = None,
    ) -> None:
        self._batch = Batch(session, ring, PrefixCache(prefix_bytes), chunk)
        self._max_waiting = max_waiting
        # Guards the attributes that other threads read or write: the queue, flags and totals.
        self._wake = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._stopping = self._closed = False
        self._in_turn = False  # while True, some Ends may not have been delivered yet
        self._fault: Exception | None = None
        self._thread: threading.Thread | None = None
        self._reading: Ticket | None = None  # the request whose prompt is being read
        self._running: dict[int, Ticket] = {}  # by row
        self._masked = np.empty(ring.spec.vocab_size, np.float32)  # logits under a constraint
        self._prompt = self._cached = self._generated = self._steps = 0

    @classmethod
    def of(
        cls, loaded: Loaded, *, max_waiting: int = MAX_WAITING, prefix_bytes: int = PREFIX_BYTES
    ) -> Self:
        """Make the scheduler of a loaded bundle. `loaded.generator` must not be used any more."""
        return cls(loaded.session, loaded.ring, max_waiting=max_waiting, prefix_bytes=prefix_bytes)

    # Called from any thread

    def submit(self, request: Request, deliver: Deliver) -> Ticket:
        """Queue a request. `deliver` is called with each token and then an End.

        It runs on the loop's thread and must not block, because every other request would wait.
        Raises ContextFullError if the prompt does not fit, QueueFullError if too many wait,
        StoppedError if nothing is taken any more, MistralcError for ids outside the vocabulary.
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
                raise StoppedError("This server is shutting down. Send the request to another one.")
            if len(self._waiting) >= self._max_waiting:
                raise QueueFullError(
                    f"{len(self._waiting)} requests are waiting, which is the most allowed. Try "
                    "again later."
                )
            self._waiting.append(ticket)
            self._wake.notify_all()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Cancel a request: End("cancelled") is delivered, unless it has ended already."""
        ticket.cancelled = True  # takes effect at the start of the next turn

    def stats(self) -> Stats:
        """Return the current state."""
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
        """Take no new requests and wait for the others to end.

        Returns True if all ended within `seconds`; otherwise the rest is cancelled.
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
        """Cancel all requests and end the loop. May be called more than once."""
        with self._wake:
            self._stopping = self._closed = True
            self._wake.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        elif self._thread is None:
            self._end_all("cancelled")

    # Called on the loop's thread

    def turn(self) -> bool:
        """Run one turn of the loop, without `start`; False if no request is left."""
        with self._wake:
            self._in_turn = True
        try:
            self._drop_cancelled()
            self._read_chunk()
            self._decode()
        except Exception as error:  # the backend failed; errors of one request end only that one
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
            gone = [ticket for ticket in self._waiting if ticket.cancelled]
            for ticket in gone:
                self._waiting.remove(ticket)
        served = [*self._running.values(), *([self._reading] if self._reading else [])]
        for ticket in (*gone, *(ticket for ticket in served if ticket.cancelled)):
            self._end(ticket, "cancelled")

    def _read_chunk(self) -> None:
        """Read one chunk of the current prompt, or of the next waiting one if a row is free."""
        if (ticket := self._reading) is None:
            with self._wake:
                if not self._waiting or not self._batch.has_free_row():
                    return
                ticket = self._waiting.popleft()
                self._reading = ticket
            if not self._begin(ticket):
                return
        logits = self._batch.prefill(ticket.row)
        if logits is not None:
            self._reading = None
            self._running[ticket.row] = ticket
            self._sample(ticket, logits)

    def _begin(self, ticket: Ticket) -> bool:
        """Give the request a row; False if it ended at once because no token may be sampled."""
        request, ring = ticket.request, self._batch.ring
        ids, limit = request.ids, request.max_new_tokens
        if not ring.spec.slides:
            room = ring.limits.context - len(ids) + 1  # the last token is not written to the ring
            limit = room if limit is None else min(limit, room)
        ticket.tokens_left = limit
        if limit is not None and limit < 1:
            self._end(ticket, "length")
            return False
        ticket.sampler = Sampler(request.params, ring.spec.vocab_size, ids)
        ticket.row, ticket.cached_tokens = self._batch.claim(ids)
        ticket.started = perf_counter()
        self._prompt += len(ids)
        self._cached += ticket.cached_tokens
        return True

    def _decode(self) -> None:
        if not self._running:
            return
        tickets = dict(self._running)
        logits = self._batch.decode({row: ticket.last_token for row, ticket in tickets.items()})
        self._steps += 1
        for row, ticket in tickets.items():
            self._sample(ticket, logits[row])

    def _sample(self, ticket: Ticket, logits: Floats) -> None:
        """Sample and deliver a request's next token; end the request if it was the last one."""
        request = ticket.request
        try:
            if request.constraint is not None:
                np.copyto(self._masked, logits)
                request.constraint.mask(self._masked)
                logits = self._masked
            sampled = ticket.sampler.sample(logits)
            token, stopped = sampled.token_id, sampled.token_id in request.stop_ids
            if request.constraint is not None and not stopped:
                stopped = request.constraint.accept(token)
            self._generated += 1
            ticket.deliver(sampled)
        except Exception as error:
            self._end(ticket, "error", error)
            return
        ticket.last_token = token
        if ticket.tokens_left is not None:
            ticket.tokens_left -= 1
        if stopped:
            self._end(ticket, "stop")
        elif ticket.tokens_left == 0:
            self._end(ticket, "length")

    def _end(self, ticket: Ticket, reason: EndReason, error: Exception | None = None) -> None:
        """Free the request's row and deliver its End, even if its receiver raises."""
        if self._reading is ticket:
            self._reading = None
        if self._running.get(ticket.row) is ticket:
            del self._running[ticket.row]
        if ticket.row >= 0:
            self._batch.release(ticket.row)
        with suppress(Exception):
            ticket.deliver(End(reason=reason, cached_tokens=ticket.cached_tokens, error=error))

    def _end_all(self, reason: EndReason, error: Exception | None = None) -> None:
        with self._wake:
            waiting = list(self._waiting)
            self._waiting.clear()
        reading = [] if self._reading is None else [self._reading]
        for ticket in (*self._running.copy().values(), *reading, *waiting):
            self._end(ticket, reason, error)
