"""The scheduler: whose turn it is, how requests end, and that no answer depends on the others.

The loop is tested on `HashSession`, whose answers depend on everything that a row holds and on the
shape of every step, and the whole on a tiny model on ONNX Runtime.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
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

from graphs.errors import MistralcError
from graphs.spec import RingSpec
from runtime.backends.session import Session
from runtime.decoding.generator import Generator
from runtime.decoding.ring import ContextFullError, Ring
from runtime.decoding.sampling import Floats, Sampled, SamplingParams
from runtime.scheduling.prefix_cache import PrefixStore
from runtime.scheduling.scheduler import (
    End,
    QueueFullError,
    Request,
    Scheduler,
    StoppedError,
    Ticket,
)
from tests.support import tiny
from tests.support.hash_session import HashSession
from tests.support.make_checkpoint import tiny_spec

ROWS = 3
GREEDY = SamplingParams(temperature=0)
# The ring of window 12 has 24 slots and chunk 8, so a text of 40 has wrapped it.
RING = RingSpec(chunk=8, context=48, max_batch=ROWS)
SPECS = {
    "unwindowed": tiny_spec(vocab_size=64),
    "windowed": tiny_spec(vocab_size=64, window=12),
    "both": tiny_spec(vocab_size=64, layer_windows=(12, None)),
}


@dataclass
class Answer:
    """What `deliver` was given."""

    tokens: list[int] = field(default_factory=list)
    end: End | None = None

    def __call__(self, item: Sampled | End) -> None:
        assert self.end is None, "nothing may come after the End"
        if isinstance(item, End):
            self.end = item
        else:
            self.tokens.append(item.token_id)

    @property
    def reason(self) -> str | None:
        return None if self.end is None else self.end.reason


def scheduler(
    spec: str = "unwindowed", *, rows: int = ROWS, partial: bool = True, **given: int
) -> tuple[Scheduler, HashSession]:
    session = HashSession(SPECS[spec], RING, rows, partial=partial)
    ring = Ring(SPECS[spec], RING, rows, grows=partial)
    return Scheduler(session, ring, SPECS[spec].vocab_size, **given), session


def request(count: int, new: int | None = 4, seed: int = 0, **given: object) -> Request:
    """A prompt of `count` tokens; those of one seed begin alike."""
    ids = tuple(np.random.default_rng(seed).integers(0, 64, 100)[:count].tolist())
    return Request(ids=ids, params=GREEDY, max_new_tokens=new, **given)  # type: ignore[arg-type]


def served(subject: Scheduler, *requests: Request) -> list[Answer]:
    """Submit all at once and run until all have ended."""
    answers = [Answer() for _ in requests]
    for each, answer in zip(requests, answers, strict=True):
        subject.submit(each, answer)
    while subject.turn():
        pass
    return answers


# Turns


def test_between_two_tokens_of_a_running_row_at_most_one_chunk_of_a_prompt_is_read():
    subject, session = scheduler()
    first, long = Answer(), Answer()
    subject.submit(request(3, 20), first)
    subject.turn()
    subject.submit(request(40, 2, seed=1), long)
    del session.steps[:]
    while not long.tokens:
        subject.turn()
    sizes = [len(next(iter(step.values()))) for step in session.steps]
    assert sizes == [8, 1] * 5
    assert len(first.tokens) == 2 + 5, "one of the prompt and one of each turn"


def test_requests_get_their_first_token_in_the_order_in_which_they_came():
    subject, _ = scheduler(rows=2)
    order: list[int] = []
    for at in range(6):
        answer = request(30 - 5 * at, 3, seed=at)
        subject.submit(answer, lambda item, at=at: order.append(at))  # type: ignore[misc]
    while subject.turn():
        pass
    assert sorted(set(order), key=order.index) == list(range(6))


def test_a_row_is_taken_again_as_soon_as_it_is_left():
    subject, _ = scheduler(rows=2)
    most = 0
    answers = [Answer() for _ in range(5)]
    for at, answer in enumerate(answers):
        subject.submit(request(5, 6, seed=at), answer)
    while subject.turn():
        most = max(most, subject.stats().running)
    assert most == 2
    assert [answer.reason for answer in answers] == ["length"] * 5


def test_decoding_takes_two_rows_at_least_and_no_more_than_it_needs():
    subject, session = scheduler(rows=3)
    served(subject, request(5, 4))
    decoded = [list(step) for step in session.steps[1:]]
    assert decoded == [[0, 1]] * 3


def test_a_row_beside_those_that_run_is_taken_before_one_far_away():
    subject, session = scheduler(rows=6)
    for seed in range(2):  # the second takes other rows, which were idle longer
        served(subject, *(request(5, 9, seed=seed + at) for at in range(2)))
    assert {tuple(step) for step in session.steps if len(step) > 1} == {(0, 1), (2, 3), (1, 2)}


# How requests end


def test_a_stop_token_is_delivered_and_ends_the_answer():
    subject, _ = scheduler()
    (free,) = served(subject, request(5, 6))
    stop = frozenset({free.tokens[2]})
    (answer,) = served(subject, request(5, 6, stop_ids=stop))
    assert answer.tokens == free.tokens[: free.tokens.index(free.tokens[2]) + 1]
    assert answer.reason == "stop"


def test_the_context_ends_an_answer_as_it_does_the_generators():
    subject, _ = scheduler()
    (answer,) = served(subject, request(46, None))
    assert answer.reason == "length"
    assert len(answer.tokens) == RING.context - 46 + 1, "the last token needs no place of its own"


def test_no_token_is_made_where_none_was_asked_for():
    subject, session = scheduler()
    (answer,) = served(subject, request(5, 0))
    assert (answer.tokens, answer.reason, session.steps) == ([], "length", [])


def test_prompts_that_cannot_be_are_refused_at_once():
    subject, _ = scheduler()
    for ids, kind in (((), MistralcError), ((64,), MistralcError), ((-1,), MistralcError),
                      ((1,) * 49, ContextFullError)):  # fmt: skip
        with pytest.raises(kind):
            subject.submit(Request(ids=ids, params=GREEDY), Answer())
    biased = SamplingParams(temperature=0, logit_bias={64: 1.0})
    with pytest.raises(MistralcError, match="Token 64 was given"):
        subject.submit(Request(ids=(1,), params=biased), Answer())
    assert subject.stats().waiting == 0


def test_a_full_queue_refuses_and_takes_again_when_there_is_room():
    subject, _ = scheduler(max_waiting=2)
    answers = [Answer() for _ in range(3)]
    subject.submit(request(3), answers[0])
    subject.submit(request(3), answers[1])
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        subject.submit(request(3), answers[2])
    subject.turn()
    subject.submit(request(3), answers[2])
    while subject.turn():
        pass
    assert [answer.reason for answer in answers] == ["length"] * 3


# Cancelling


def test_a_request_can_be_cancelled_while_it_waits_is_read_or_runs():
    subject, _ = scheduler(rows=2)
    answers = [Answer() for _ in range(4)]
    lengths = (3, 40, 3, 3)
    tickets = [
        subject.submit(request(count, 9, seed=at), answer)
        for at, (count, answer) in enumerate(zip(lengths, answers, strict=True))
    ]
    for _ in range(3):
        subject.turn()
    assert len(answers[0].tokens) > 1, "the first runs"
    assert subject.stats().running == 2, "the second is read"
    for at in (0, 1, 2):
        subject.cancel(tickets[at])
    while subject.turn():
        pass
    assert [answer.reason for answer in answers] == ["cancelled"] * 3 + ["length"]
    assert answers[3].tokens == alone("unwindowed", True, request(3, 9, seed=3)).tokens


def test_cancelling_what_has_ended_does_nothing():
    subject, _ = scheduler()
    answer = Answer()
    ticket = subject.submit(request(3), answer)
    while subject.turn():
        pass
    subject.cancel(ticket)
    subject.turn()
    assert answer.reason == "length"


def test_a_receiver_may_cancel_its_own_request():
    subject, _ = scheduler()
    answer, tickets = Answer(), list[Ticket]()

    def deliver(item: Sampled | End) -> None:
        answer(item)
        if len(answer.tokens) == 2:
            subject.cancel(tickets[0])

    tickets.append(subject.submit(request(3, 9), deliver))
    while subject.turn():
        pass
    assert (len(answer.tokens), answer.reason) == (2, "cancelled")


# Faults


class Digits:
    """A constraint: `count` tokens below 10, then the text is complete."""

    def __init__(self, count: int, fail: str = "") -> None:
        self.left, self.fail = count, fail

    def mask(self, logits: Floats) -> None:
        if self.fail == "mask":
            raise RuntimeError("no such grammar")
        logits[10:] = -np.inf
        if self.fail == "all":
            logits[:] = -np.inf

    def accept(self, token_id: int) -> bool:
        if self.fail == "accept":
            raise RuntimeError("no such token")
        assert token_id < 10
        self.left -= 1
        return self.left == 0


def test_a_constraint_masks_tokens_and_ends_the_text_when_it_is_complete():
    subject, _ = scheduler()
    (answer,) = served(subject, request(5, 9, constraint=Digits(4)))
    assert len(answer.tokens) == 4
    assert max(answer.tokens) < 10
    assert answer.reason == "stop"


@pytest.mark.parametrize("fail", ["mask", "accept", "all"])
def test_a_constraint_that_fails_ends_its_own_request_only(fail: str):
    subject, _ = scheduler()
    other = request(7, 5, seed=1)
    broken, whole = served(subject, request(5, 9, constraint=Digits(4, fail)), other)
    assert broken.reason == "error"
    assert broken.end is not None
    assert broken.end.error is not None
    assert whole.tokens == alone("unwindowed", True, other).tokens
    assert subject.stats().fault is None


def test_a_receiver_that_raises_loses_its_own_request_only():
    subject, _ = scheduler()
    got: list[object] = []

    def deliver(item: Sampled | End) -> None:
        got.append(item)
        raise BrokenPipeError("gone")

    other, answer = request(7, 5, seed=1), Answer()
    subject.submit(request(5, 9), deliver)
    subject.submit(other, answer)
    while subject.turn():
        pass
    assert len(got) == 2
    assert isinstance(got[1], End)
    assert got[1].reason == "error"
    assert answer.tokens == alone("unwindowed", True, other).tokens


def test_a_backend_that_fails_ends_everything_and_nothing_more_is_taken():
    subject, session = scheduler(rows=2)
    answers = [Answer() for _ in range(4)]
    for at, answer in enumerate(answers):
        subject.submit(request(12, 9, seed=at), answer)
    for _ in range(3):
        subject.turn()
    session.fails = RuntimeError("the device fell off the bus")
    while subject.turn():
        pass
    assert [answer.reason for answer in answers] == ["error"] * 4
    assert all(answer.end is not None and answer.end.error is session.fails for answer in answers)
    assert subject.stats().fault == "the device fell off the bus"
    with pytest.raises(StoppedError, match="fell off the bus"):
        subject.submit(request(3), Answer())


# The thread


@pytest.fixture
def started() -> Iterator[Callable[..., Scheduler]]:
    """`started(...)` is a scheduler whose loop runs; closed at the end."""
    all_of_them: list[Scheduler] = []

    def start(**given: int) -> Scheduler:
        all_of_them.append(scheduler(**given)[0])
        all_of_them[-1].start()
        return all_of_them[-1]

    yield start
    for each in all_of_them:
        each.close()


def test_draining_lets_everything_end_and_takes_nothing_new(started: Callable[..., Scheduler]):
    subject = started()
    answers = [Answer() for _ in range(8)]
    for at, answer in enumerate(answers):
        subject.submit(request(9, 5, seed=at), answer)
    assert subject.drain(60)
    assert [answer.reason for answer in answers] == ["length"] * 8
    with pytest.raises(StoppedError):
        subject.submit(request(3), Answer())


def test_what_does_not_end_in_time_is_cancelled(started: Callable[..., Scheduler]):
    subject, running, go = started(), threading.Event(), threading.Event()
    ends: list[Sampled | End] = []

    def deliver(item: Sampled | End) -> None:
        ends.append(item)
        running.set()
        go.wait(60)  # the loop stands still, so nothing can end in time

    waiting = Answer()
    subject.submit(request(9, 30), deliver)
    subject.submit(request(9, 30), waiting)
    assert running.wait(60)
    threading.Timer(0.2, go.set).start()
    assert not subject.drain(0.05)
    assert isinstance(ends[-1], End)
    assert (ends[-1].reason, waiting.reason) == ("cancelled", "cancelled")


def test_closing_twice_is_once_and_what_waits_is_told(started: Callable[..., Scheduler]):
    subject, _ = scheduler()
    answer = Answer()
    subject.submit(request(9, 30), answer)
    subject.close()
    subject.close()
    assert answer.reason == "cancelled"
    assert not subject.turn()


# Prompts that begin alike


def test_what_a_row_holds_of_a_prompt_is_not_computed_again():
    subject, _ = scheduler(prefix_bytes=0)
    first, second = served(subject, request(20, 3)), served(subject, request(30, 3))
    assert first[0].end == End(reason="length", cached_tokens=0)
    assert second[0].end == End(reason="length", cached_tokens=16), "whole chunks of 8"
    assert subject.stats().cached_tokens == 16
    assert second[0].tokens == alone("unwindowed", True, request(30, 3)).tokens


def test_a_prompt_that_is_held_whole_still_has_its_last_chunk_computed_for_its_logits():
    subject, _ = scheduler()
    served(subject, request(16, 3))
    (again,) = served(subject, request(16, 3))
    assert again.end == End(reason="length", cached_tokens=8)
    assert again.tokens == alone("unwindowed", True, request(16, 3)).tokens


@pytest.mark.parametrize("spec", SPECS)
def test_a_prompt_is_paid_once_also_where_its_rows_were_used_for_others(spec: str):
    subject, _ = scheduler(spec)
    served(subject, request(33, 3))
    served(subject, *(request(40, 8, seed=at) for at in range(1, 6)))
    (again,) = served(subject, request(36, 3))
    assert again.end == End(reason="length", cached_tokens=32)
    assert again.tokens == alone(spec, True, request(36, 3)).tokens


def test_requests_that_come_together_share_what_the_first_has_read():
    subject, _ = scheduler()
    prefix = request(32).ids
    many = [replace(request(1), ids=(*prefix, at)) for at in range(6)]
    answers = served(subject, *many)
    assert [answer.end.cached_tokens for answer in answers if answer.end] == [0] + [32] * 5


def test_the_store_keeps_to_its_limit_and_drops_the_ends_of_old_texts_first():
    store = PrefixStore(4 * 80)
    block = [np.zeros(10)]  # 80 bytes
    old, new = store.keys(list(range(24)), 8), store.keys(list(range(100, 116)), 8)
    for text in (old, new):
        for key in text:
            store.put(key, block)
            store.renew(text)
    assert store.nbytes == 4 * 80
    assert [key in store.kept for key in (*old, *new)] == [True, True, False, True, True]
    store.renew(old)
    store.put(b"another", block)
    assert [key in store.kept for key in (*old, *new)] == [True, True, False, True, False]


def test_texts_share_chunks_up_to_where_they_part_and_not_beyond():
    store = PrefixStore(1)
    one, two = store.keys([1, 2, 3, 4, 5, 6], 2), store.keys([1, 2, 9, 4, 5, 6], 2)
    assert one[0] == two[0]
    assert not set(one[1:]) & set(two[1:])
    assert store.keys([1, 2, 3], 2) == one[:1]


def test_a_chunk_that_does_not_divide_the_bundles_is_refused():
    with pytest.raises(MistralcError, match="a divisor of the bundle's chunk 8"):
        scheduler(chunk=3)


# The same answers, whoever else is there


@cache
def alone(spec: str, partial: bool, asked: Request) -> Answer:
    subject, _ = scheduler(spec, partial=partial)
    return served(subject, asked)[0]


@cache
def model_alone(spec: str, asked: Request) -> Answer:
    model = SPECS[spec]
    ring = Ring(model, RING, ROWS)
    subject = Scheduler(_model(spec, "alone"), ring, model.vocab_size)
    return served(subject, asked)[0]


@cache
def _model(spec: str, which: str) -> Session:
    """A session of the tiny model; each `which` has its own ring."""
    return tiny.load(tiny.model_bytes(SPECS[spec], "cpu"), SPECS[spec], ROWS)


class Crowd(RuleBasedStateMachine):
    """Requests come and go at random; in the end each has got what it would have got alone."""

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
                assert ticket._cancelled
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
        lambda: scheduler(spec, partial=partial, prefix_bytes=10_000)[0],
        lambda asked: alone(spec, partial, asked),
    )


def _model_crowd(spec: str) -> type:
    def open_one() -> Scheduler:
        ring = Ring(SPECS[spec], RING, ROWS)
        return Scheduler(
            _model(spec, "together"), ring, SPECS[spec].vocab_size, prefix_bytes=50_000
        )

    return crowd(f"model_{spec}", open_one, lambda asked: model_alone(spec, asked))


FEW = settings(max_examples=40, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("partial", [True, False], ids=["partial", "all-rows"])
@pytest.mark.parametrize("spec", SPECS)
def test_a_crowd_gets_what_each_would_have_got_alone(spec: str, partial: bool):
    run_state_machine_as_test(_hash_crowd(spec, partial), settings=FEW)


@pytest.mark.parametrize("spec", ["unwindowed", "windowed"])
def test_a_crowd_on_a_model_gets_what_each_would_have_got_alone(spec: str):
    run_state_machine_as_test(_model_crowd(spec), settings=settings(FEW, max_examples=15))


@pytest.mark.parametrize("spec", SPECS)
def test_the_scheduler_says_what_the_generator_says(spec: str):
    model = SPECS[spec]
    asked = [request(count, 12, seed=count) for count in (3, 8, 17, 30)]
    subject = Scheduler(_model(spec, "together"), Ring(model, RING, ROWS), model.vocab_size)
    answers = served(subject, *asked)
    generator = Generator(tiny.session(model), Ring(model, RING), model.vocab_size)
    for each, answer in zip(asked, answers, strict=True):
        generator.rewind(0)
        logits = generator.feed(each.ids)
        steps = generator.generate(logits, GREEDY, max_new_tokens=12)
        assert answer.tokens == [step.token_id for step in steps]
