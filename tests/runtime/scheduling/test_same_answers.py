"""No answer depends on which other requests are running.

Random crowds of requests, on `HashSession` and on a tiny model on ONNX Runtime; and the scheduler's
tokens against the generator's.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from runtime.backends.session import Session
from runtime.decoding.generator import Generator
from runtime.decoding.ring import Ring
from runtime.load import load
from runtime.scheduling.request import Request, Ticket
from runtime.scheduling.scheduler import Scheduler
from tests.support import tiny
from tests.support.scheduling import (
    GREEDY,
    RING,
    ROWS,
    SPECS,
    Answer,
    alone,
    make_scheduler,
    request,
    served,
)


@cache
def model_alone(spec: str, asked: Request) -> Answer:
    model = SPECS[spec]
    ring = Ring(model, RING, ROWS)
    subject = Scheduler(_model(spec, "alone"), ring)
    return served(subject, asked)[0]


@cache
def _model(spec: str, which: str) -> Session:
    """A session of the tiny model; each `which` has its own ring."""
    return tiny.load(tiny.model_bytes(SPECS[spec], "cpu"), SPECS[spec], ROWS)


class Crowd(RuleBasedStateMachine):
    """Requests come and go at random; in the end each must have its answer as if alone."""

    spec: str

    def open(self) -> Scheduler:
        raise NotImplementedError

    def expected(self, asked: Request) -> Answer:
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.subject = self.open()
        self.asked: list[tuple[Request, Ticket, Answer]] = []

    @rule(
        shared=st.integers(0, 30),
        own=st.lists(st.integers(0, 63), min_size=1, max_size=12),
        new=st.integers(1, 20),
        seed=st.integers(0, 1),
    )
    def submit(self, shared: int, own: list[int], new: int, seed: int) -> None:
        asked = request(shared, new, seed)
        asked = replace(asked, ids=(*asked.ids, *own))
        answer = Answer()
        self.asked.append((asked, self.subject.submit(asked, answer), answer))

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.subject.cancel(data.draw(st.sampled_from(self.asked))[1])

    @rule(count=st.integers(1, 8))
    def turns(self, count: int) -> None:
        for _ in range(count):
            self.subject.turn()

    @invariant()
    def rows_are_enough(self) -> None:
        stats = self.subject.stats()
        assert stats.running <= stats.rows
        assert stats.fault is None

    def teardown(self) -> None:
        while self.subject.turn():
            pass
        assert self.subject.stats().fault is None
        for asked, ticket, answer in self.asked:
            expected = self.expected(asked)
            if answer.reason == "cancelled":
                assert ticket.cancelled
                assert answer.tokens == expected.tokens[: len(answer.tokens)]
            else:
                assert (answer.tokens, answer.reason) == (expected.tokens, expected.reason)


def crowd(of: str, open_one: Callable[[], Scheduler], answer: Callable[[Request], Answer]) -> type:
    """A Crowd on one kind of session."""
    methods = {"open": lambda self: open_one(), "expected": lambda self, asked: answer(asked)}
    return type(f"Crowd_{of}", (Crowd,), methods)


def _hash_crowd(spec: str, partial: bool) -> type:
    return crowd(
        f"{spec}_{partial}",
        lambda: make_scheduler(spec, partial=partial, prefix_bytes=10_000)[0],
        lambda asked: alone(spec, partial, asked),
    )


def _model_crowd(spec: str) -> type:
    def open_one() -> Scheduler:
        ring = Ring(SPECS[spec], RING, ROWS)
        return Scheduler(_model(spec, "together"), ring, prefix_bytes=50_000)

    return crowd(f"model_{spec}", open_one, lambda asked: model_alone(spec, asked))


FEW = settings(max_examples=40, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("partial", [True, False], ids=["partial", "all-rows"])
@pytest.mark.parametrize("spec", SPECS)
def test_each_request_in_a_crowd_is_answered_as_if_alone(spec: str, partial: bool):
    run_state_machine_as_test(_hash_crowd(spec, partial), settings=FEW)


@pytest.mark.parametrize("spec", ["unwindowed", "windowed"])
def test_each_request_in_a_crowd_on_a_model_is_answered_as_if_alone(spec: str):
    run_state_machine_as_test(_model_crowd(spec), settings=settings(FEW, max_examples=15))


@pytest.mark.parametrize("spec", SPECS)
def test_the_scheduler_gives_the_tokens_of_the_generator(spec: str):
    model = SPECS[spec]
    asked = [request(count, 12, seed=count) for count in (3, 8, 17, 30)]
    subject = Scheduler(_model(spec, "together"), Ring(model, RING, ROWS))
    answers = served(subject, *asked)
    generator = Generator(tiny.session(model), Ring(model, RING), model.vocab_size)
    for each, answer in zip(asked, answers, strict=True):
        generator.rewind(0)
        logits = generator.feed(each.ids)
        steps = generator.generate(logits, GREEDY, max_new_tokens=12)
        assert answer.tokens == [step.token_id for step in steps]


def test_the_scheduler_of_a_loaded_bundle_gives_the_tokens_of_its_generator(plain_bundle: Path):
    loaded = load(plain_bundle)
    generator, ids = loaded.generator, tuple(loaded.tokenizer.encode("Hello"))
    assert loaded.generator is generator, "the generator keeps its text between uses"
    steps = generator.generate(generator.feed(ids), GREEDY, max_new_tokens=12)
    expected = [step.token_id for step in steps]
    subject = Scheduler.of(load(plain_bundle, rows=2))
    (answer,) = served(subject, Request(ids=ids, params=GREEDY, max_new_tokens=12))
    assert answer.tokens == expected
