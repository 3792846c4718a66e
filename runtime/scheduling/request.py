"""What goes into the scheduler and what comes out. Knows nothing about rows, threads or text."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from graphs.errors import MistralcError
from runtime.decoding.sampling import Floats, Sampled, Sampler, SamplingParams

EndReason = Literal["stop", "length", "cancelled", "error"]


class Constraint(Protocol):
    """A rule that generated text has to follow, token by token."""

    def mask(self, logits: Floats) -> None:
        """Set the logits [V] of tokens that must not come next to -inf, in place."""

    def accept(self, token_id: int) -> bool:
        """Take the next token; True if the text is now complete and must end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt and how to continue it. One of `stop_ids` ends the text and is delivered too."""

    ids: tuple[int, ...]
    params: SamplingParams
    max_new_tokens: int | None = None
    stop_ids: frozenset[int] = frozenset()
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a request ended. `cached_tokens` of its prompt did not have to be computed."""

    reason: EndReason
    cached_tokens: int
    error: Exception | None = None


Deliver = Callable[[Sampled | End], None]


class Ticket:
    """A submitted request.

    `started` is when it was given a row, on `perf_counter`'s clock; None while it waits. All
    attributes below that one are the scheduler's own.
    """

    def __init__(self, request: Request, deliver: Deliver) -> None:
        self.request = request
        self.started: float | None = None
        self.deliver = deliver
        self.cancelled = False
        self.row = -1
        self.cached_tokens = 0
        self.sampler: Sampler
        self.tokens_left: int | None = None  # how many may still be sampled; None: no limit
        self.last_token = -1  # sampled, but not in the ring yet


class QueueFullError(MistralcError):
    """The queue of waiting requests is full."""


class StoppedError(MistralcError):
    """The scheduler takes no more requests: it is draining, closed, or its backend failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """The state of the scheduler. Totals count from its start.

    `positions` are the rows' next positions and `capacity` the slots of the largest ring.
    `fault` is the backend's error message once it has failed; nothing is served after that.
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
