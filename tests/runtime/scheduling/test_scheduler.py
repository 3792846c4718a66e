"""The scheduler: whose turn it is, how requests end, what a failure affects, the thread.

Run on `HashSession`, whose answers depend on everything that a row holds and on the shape of every
step.
"""

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from graphs.errors import MistralcError
from runtime.decoding.ring import ContextFullError
from runtime.decoding.sampling import Floats, Sampled, SamplingParams
from runtime.scheduling.request import End, QueueFullError, Request, StoppedError, Ticket
from runtime.scheduling.scheduler import Scheduler
from tests.support.scheduling import (
    GREEDY,
    RING,
    Answer,
    alone,
    make_scheduler,
    request,
    served,
)

# Turns


def test_at_most_one_prompt_chunk_is_read_between_two_tokens_of_a_running_row():
    subject, session = make_scheduler()
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
    subject, _ = make_scheduler(rows=2)
    order: list[int] = []
    for at in range(6):
        answer = request(30 - 5 * at, 3, seed=at)
        subject.submit(answer, lambda item, at=at: order.append(at))  # type: ignore[misc]
    while subject.turn():
        pass
    assert sorted(set(order), key=order.index) == list(range(6))


def test_a_freed_row_is_reused_at_once():
    subject, _ = make_scheduler(rows=2)
    most = 0
    answers = [Answer() for _ in range(5)]
    for at, answer in enumerate(answers):
        subject.submit(request(5, 6, seed=at), answer)
    while subject.turn():
        most = max(most, subject.stats().running)
    assert most == 2
    assert [answer.reason for answer in answers] == ["length"] * 5


def test_decoding_runs_at_least_two_rows_and_no_more_than_it_needs():
    subject, session = make_scheduler(rows=3)
    served(subject, request(5, 4))
    decoded = [list(step) for step in session.steps[1:]]
    assert decoded == [[0, 1]] * 3


def test_a_free_row_next_to_the_running_rows_is_preferred():
    subject, session = make_scheduler(rows=6)
    for seed in range(2):  # the second takes other rows, which were idle longer
        served(subject, *(request(5, 9, seed=seed + at) for at in range(2)))
    assert {tuple(step) for step in session.steps if len(step) > 1} == {(0, 1), (2, 3), (1, 2)}


def test_a_chunk_that_does_not_divide_the_bundles_chunk_is_refused():
    with pytest.raises(MistralcError, match="a divisor of the bundle's chunk 8"):
        make_scheduler(chunk=3)


# How requests end


def test_a_stop_token_is_delivered_and_ends_the_answer():
    subject, _ = make_scheduler()
    (free,) = served(subject, request(5, 6))
    stop = frozenset({free.tokens[2]})
    (answer,) = served(subject, request(5, 6, stop_ids=stop))
    assert answer.tokens == free.tokens[: free.tokens.index(free.tokens[2]) + 1]
    assert answer.reason == "stop"


def test_a_full_context_ends_an_answer_as_in_the_generator():
    subject, _ = make_scheduler()
    (answer,) = served(subject, request(46, None))
    assert answer.reason == "length"
    assert len(answer.tokens) == RING.context - 46 + 1, "the last token needs no place of its own"


def test_a_request_for_no_token_runs_no_step():
    subject, session = make_scheduler()
    (answer,) = served(subject, request(5, 0))
    assert (answer.tokens, answer.reason, session.steps) == ([], "length", [])


def test_invalid_requests_are_refused_at_once():
    subject, _ = make_scheduler()
    for ids, kind in (((), MistralcError), ((64,), MistralcError), ((-1,), MistralcError),
                      ((1,) * 49, ContextFullError)):  # fmt: skip
        with pytest.raises(kind):
            subject.submit(Request(ids=ids, params=GREEDY), Answer())
    biased = SamplingParams(temperature=0, logit_bias={64: 1.0})
    with pytest.raises(MistralcError, match="Token 64 was given"):
        subject.submit(Request(ids=(1,), params=biased), Answer())
    assert subject.stats().waiting == 0


def test_a_full_queue_refuses_and_accepts_again_when_there_is_room():
    subject, _ = make_scheduler(max_waiting=2)
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


def test_a_request_can_be_cancelled_while_waiting_being_read_or_running():
    subject, _ = make_scheduler(rows=2)
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


def test_cancelling_an_ended_request_does_nothing():
    subject, _ = make_scheduler()
    answer = Answer()
    ticket = subject.submit(request(3), answer)
    while subject.turn():
        pass
    subject.cancel(ticket)
    subject.turn()
    assert answer.reason == "length"


def test_a_receiver_may_cancel_its_own_request():
    subject, _ = make_scheduler()
    answer, tickets = Answer(), list[Ticket]()

    def deliver(item: Sampled | End) -> None:
        answer(item)
        if len(answer.tokens) == 2:
            subject.cancel(tickets[0])

    tickets.append(subject.submit(request(3, 9), deliver))
    while subject.turn():
        pass
    assert (len(answer.tokens), answer.reason) == (2, "cancelled")


# Failures


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


def test_a_constraint_masks_tokens_and_ends_a_complete_text():
    subject, _ = make_scheduler()
    (answer,) = served(subject, request(5, 9, constraint=Digits(4)))
    assert len(answer.tokens) == 4
    assert max(answer.tokens) < 10
    assert answer.reason == "stop"


@pytest.mark.parametrize("fail", ["mask", "accept", "all"])
def test_a_failing_constraint_ends_only_its_own_request(fail: str):
    subject, _ = make_scheduler()
    other = request(7, 5, seed=1)
    broken, whole = served(subject, request(5, 9, constraint=Digits(4, fail)), other)
    assert broken.reason == "error"
    assert broken.end is not None
    assert broken.end.error is not None
    assert whole.tokens == alone("unwindowed", True, other).tokens
    assert subject.stats().fault is None


def test_a_receiver_that_raises_ends_only_its_own_request():
    subject, _ = make_scheduler()
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


def test_a_failing_backend_ends_all_requests_and_new_ones_are_refused():
    subject, session = make_scheduler(rows=2)
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
        all_of_them.append(make_scheduler(**given)[0])
        all_of_them[-1].start()
        return all_of_them[-1]

    yield start
    for each in all_of_them:
        each.close()


def test_draining_finishes_all_requests_and_refuses_new_ones(started: Callable[..., Scheduler]):
    subject = started()
    answers = [Answer() for _ in range(8)]
    for at, answer in enumerate(answers):
        subject.submit(request(9, 5, seed=at), answer)
    assert subject.drain(60)
    assert [answer.reason for answer in answers] == ["length"] * 8
    with pytest.raises(StoppedError):
        subject.submit(request(3), Answer())


def test_requests_that_outlast_the_drain_are_cancelled(started: Callable[..., Scheduler]):
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


def test_closing_cancels_waiting_requests_and_may_be_repeated(started: Callable[..., Scheduler]):
    subject, _ = make_scheduler()
    answer = Answer()
    subject.submit(request(9, 30), answer)
    subject.close()
    subject.close()
    assert answer.reason == "cancelled"
    assert not subject.turn()
