"""Pass tokens from the scheduler's thread to the event loop. Knows nothing about HTTP or text.

In every step the scheduler delivers a token for each running row. They are collected, and the event
loop is woken once for all of them.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Sequence
from functools import partial
from time import perf_counter
from typing import NamedTuple

from graphs.errors import MistralcError, UsageError
from runtime.decoding.ring import ContextFullError
from runtime.decoding.sampling import Sampled
from runtime.scheduling.request import End, QueueFullError, Request, Ticket
from runtime.scheduling.scheduler import Scheduler
from runtime.serve.errors import ApiError
from runtime.serve.metrics import Metrics


class Arrival(NamedTuple):
    """A token or End that the scheduler delivered for one choice, and when (`perf_counter`)."""

    choice: int
    at: float
    item: Sampled | End


class Inbox:
    """Hands deliveries from the scheduler's thread to jobs on the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._new: deque[tuple[Job, Arrival]] = deque()
        self._waking = False

    def post(self, job: "Job", choice: int, item: Sampled | End) -> None:
        """Take one delivery. Called on the scheduler's thread; never blocks."""
        self._new.append((job, Arrival(choice, perf_counter(), item)))
        if not self._waking:
            self._waking = True
            with contextlib.suppress(RuntimeError):  # the event loop has ended
                self._loop.call_soon_threadsafe(self._distribute)

    def _distribute(self) -> None:
        self._waking = False  # first, so that later deliveries wake the loop again
        while self._new:
            job, arrival = self._new.popleft()
            job.put(arrival)


class Job:
    """The choices of one HTTP request while the scheduler works on them."""

    def __init__(self, scheduler: Scheduler, inbox: Inbox, metrics: Metrics, buffered: int) -> None:
        self.open = 0  # choices that have not ended
        self.overflow = asyncio.Event()  # set when the client does not keep up
        self._scheduler, self._inbox, self._metrics = scheduler, inbox, metrics
        self._buffered = buffered
        self._tickets: list[Ticket] = []
        self._latest: list[float | None] = []  # when each choice got its last token
        self._arrivals: list[Arrival] = []
        self._arrived = asyncio.Event()
        self._began = perf_counter()

    def submit(self, requests: Sequence[Request]) -> None:
        """Submit one request for each choice.

        Raises ApiError if one of them is refused; the others are then cancelled.
        """
        self._latest = [None] * len(requests)  # first: tokens may come before all are submitted
        try:
            for choice, request in enumerate(requests):
                deliver = partial(self._inbox.post, self, choice)
                self._tickets.append(self._scheduler.submit(request, deliver))
        except MistralcError as error:
            self.cancel()
            raise _refusal(error) from error
        self.open = len(self._tickets)

    def put(self, arrival: Arrival) -> None:
        """Store an arrival; called on the event loop."""
        if isinstance(arrival.item, End):
            self.open -= 1
        else:
            self._observe(arrival)
        self._arrivals.append(arrival)
        self._arrived.set()
        if len(self._arrivals) > self._buffered * len(self._tickets):
            self.overflow.set()

    @property
    def done(self) -> bool:
        """Whether every choice has ended and every arrival was taken."""
        return not self.open and not self._arrivals

    async def take(self) -> list[Arrival]:
        """Return all arrivals since the last call; waits until there is one."""
        await self._arrived.wait()
        self._arrived.clear()
        taken, self._arrivals = self._arrivals, []
        return taken

    def cancel(self, choice: int | None = None) -> None:
        """Cancel one choice, or all of them. Choices that have ended stay as they are."""
        for ticket in self._tickets if choice is None else [self._tickets[choice]]:
            self._scheduler.cancel(ticket)

    def _observe(self, arrival: Arrival) -> None:
        before = self._latest[arrival.choice]
        if before is None:
            started = self._tickets[arrival.choice].started
            self._metrics.queue.observe((started or arrival.at) - self._began)
            self._metrics.ttft.observe(arrival.at - self._began)
        else:
            self._metrics.inter_token.observe(arrival.at - before)
        self._latest[arrival.choice] = arrival.at


def _refusal(error: MistralcError) -> ApiError:
    match error:
        case QueueFullError():
            return ApiError(429, str(error), code="queue_full")
        case ContextFullError():
            return ApiError(400, str(error), code="context_length_exceeded")
        case UsageError():
            return ApiError(400, str(error))
    return ApiError(503, str(error))
