"""Requests for the scheduler, and schedulers on a `HashSession`. Asserts nothing about answers."""

from dataclasses import dataclass, field
from functools import cache

import numpy as np

from graphs.spec import RingSpec
from runtime.decoding.ring import Ring
from runtime.decoding.sampling import Sampled, SamplingParams
from runtime.scheduling.request import End, Request
from runtime.scheduling.scheduler import Scheduler
from tests.support.hash_session import HashSession
from tests.support.make_checkpoint import tiny_spec

ROWS = 3
GREEDY = SamplingParams(temperature=0)
# The ring of window 12 has 24 slots and chunk 8, so a text of 40 tokens wraps it.
RING = RingSpec(chunk=8, context=48, max_batch=ROWS)
SPECS = {
    "unwindowed": tiny_spec(vocab_size=64),
    "windowed": tiny_spec(vocab_size=64, window=12),
    "both": tiny_spec(vocab_size=64, layer_windows=(12, None)),
}


@dataclass
class Answer:
    """A receiver for `deliver` that stores what it gets."""

    tokens: list[int] = field(default_factory=list)
    end: End | None = None

    def __call__(self, item: Sampled | End) -> None:
        assert self.end is None, "nothing may be delivered after the End"
        if isinstance(item, End):
            self.end = item
        else:
            self.tokens.append(item.token_id)

    @property
    def reason(self) -> str | None:
        return None if self.end is None else self.end.reason


def make_scheduler(
    spec: str = "unwindowed", *, rows: int = ROWS, partial: bool = True, **options: int
) -> tuple[Scheduler, HashSession]:
    session = HashSession(SPECS[spec], RING, rows, partial=partial)
    ring = Ring(SPECS[spec], RING, rows, grows=partial)
    return Scheduler(session, ring, **options), session


def request(count: int, new: int | None = 4, seed: int = 0, **options: object) -> Request:
    """A prompt of `count` tokens. Prompts of the same seed begin alike."""
    ids = tuple(np.random.default_rng(seed).integers(0, 64, 100)[:count].tolist())
    return Request(ids=ids, params=GREEDY, max_new_tokens=new, **options)  # type: ignore[arg-type]


def served(subject: Scheduler, *requests: Request) -> list[Answer]:
    """Submit all requests at once and run until all have ended."""
    answers = [Answer() for _ in requests]
    for each, answer in zip(requests, answers, strict=True):
        subject.submit(each, answer)
    while subject.turn():
        pass
    return answers


@cache
def alone(spec: str, partial: bool, asked: Request) -> Answer:
    """What a request is answered if there is no other."""
    subject, _ = make_scheduler(spec, partial=partial)
    return served(subject, asked)[0]
