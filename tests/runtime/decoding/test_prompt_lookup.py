"""Speculation by prompt lookup changes the number of steps and nothing else."""

from array import array
from collections.abc import Callable

import numpy as np
import pytest

from graphs.spec import ModelSpec, RingSpec
from runtime.backends.session import Ids, Logits
from runtime.decoding.generator import Generator
from runtime.decoding.prompt_lookup import (
    COST,
    FIRST_SHARE,
    LONGEST_PAUSE,
    NGRAM,
    PROBE_TOKENS,
    PromptLookup,
)
from runtime.decoding.ring import Ring
from runtime.decoding.sampling import SamplingParams
from tests.support import tiny
from tests.support.make_checkpoint import tiny_spec

VOCABULARY = 50
GREEDY = SamplingParams(temperature=0)


class FunctionSession:
    """A "model" whose next token is a function of position and token; records step lengths."""

    def __init__(self, follows: Callable[[int, int], int]) -> None:
        self.follows = follows
        self.lengths: list[int] = []
        self.last = -1

    def resize(self, capacities: object) -> None:
        pass

    def step(self, input_ids: Ids, position_ids: Ids, logits_indices: Ids) -> Logits:
        assert np.array_equal(np.diff(position_ids[0]), np.ones(position_ids.shape[1] - 1))
        self.lengths.append(input_ids.shape[1])
        logits = np.zeros((1, logits_indices.shape[1], VOCABULARY), np.float32)
        for row, index in enumerate(logits_indices[0]):
            token = self.follows(int(position_ids[0, index]), int(input_ids[0, index]))
            logits[0, row, token] = 5
        return logits


def generated(
    follows: Callable[[int, int], int], speculate: int, prompt: list[int], count: int,
    params: SamplingParams = GREEDY, *, window: int | None = 16, chunk: int = 8,
    stop_ids: frozenset[int] = frozenset(),
) -> tuple[list[int], FunctionSession, Generator]:  # fmt: skip
    session = FunctionSession(follows)
    ring = Ring(tiny_spec(window=window), RingSpec(chunk=chunk, context=64))
    subject = Generator(session, ring, VOCABULARY)
    logits = subject.feed(prompt)
    session.lengths.clear()
    steps = subject.generate(
        logits, params, max_new_tokens=count, stop_ids=stop_ids, speculate=speculate
    )
    return [one.token_id for one in steps], session, subject


def circling(position: int, token: int) -> int:
    """Seven tokens in a cycle."""
    return (token + 1) % 7


def wandering(position: int, token: int) -> int:
    """A sequence in which no three tokens repeat for long."""
    return (token * 7 + position * position) % VOCABULARY


def stumbling(position: int, token: int) -> int:
    """Seven tokens in a cycle, except at every eleventh position."""
    return 40 if position % 11 == 0 else (token + 1) % 7


@pytest.mark.parametrize("follows", [circling, wandering, stumbling])
@pytest.mark.parametrize("temperature", [0.0, 2.0])
@pytest.mark.parametrize("speculate", [1, 3, 6, 20])
def test_speculation_changes_no_token(
    follows: Callable[[int, int], int], temperature: float, speculate: int
) -> None:
    params = SamplingParams(temperature=temperature, seed=3, repetition_penalty=1.1)
    prompt = [0, 1, 2, 3, 4, 5, 6] * 2
    expected, plain, there = generated(follows, 0, prompt, 150, params)
    found, session, here = generated(follows, speculate, prompt, 150, params)
    assert found == expected
    assert (here.position, here.tokens) == (there.position, there.tokens)
    assert plain.lengths == [1] * 149
    assert sum(session.lengths) >= 149
    assert max(session.lengths) <= min(1 + speculate, 8), "a step must not exceed a chunk"


def test_repetition_takes_fewer_steps() -> None:
    _, session, _ = generated(circling, 7, [0, 1, 2, 3, 4, 5, 6] * 2, 150)
    # 3, 5, then 8 at a time, except where the end of the ring of 24 slots cuts a step.
    assert len(session.lengths) <= 149 / 6


def test_drafts_stop_if_they_are_wrong() -> None:
    never = np.random.Generator(np.random.PCG64(1)).integers(0, 5, 2000).tolist()
    _, session, _ = generated(lambda position, _: never[position], 7, [1], 1500)
    assert session.lengths.count(1) > 0.9 * len(session.lengths)


def test_a_stop_token_inside_a_draft_ends_the_text() -> None:
    found, _, subject = generated(
        circling, 7, [0, 1, 2, 3, 4, 5, 6] * 2, 150, stop_ids=frozenset({4})
    )
    assert found == [0, 1, 2, 3, 4]
    assert subject.finish_reason == "stop"
    assert subject.tokens[-4:].tolist() == [0, 1, 2, 3], "the stop token is not written"
    assert subject.position == len(subject.tokens)


def test_no_draft_exceeds_max_new_tokens_or_the_context() -> None:
    prompt = [0, 1, 2, 3, 4, 5, 6] * 2
    _, session, subject = generated(circling, 7, prompt, 4)
    assert subject.position == len(prompt) + 3
    assert sum(session.lengths) <= 4
    found, _, subject = generated(circling, 7, prompt, 1000, window=None)  # a context of 64
    assert len(found) == 64 - len(prompt) + 1
    assert subject.finish_reason == "length"


def test_after_an_early_stop_the_ring_is_at_the_end_of_the_text() -> None:
    session = FunctionSession(circling)
    ring = Ring(tiny_spec(window=16), RingSpec(chunk=8, context=64))
    subject = Generator(session, ring, VOCABULARY)
    logits = subject.feed([0, 1, 2, 3, 4, 5, 6] * 2)
    steps = subject.generate(logits, GREEDY, speculate=7)
    taken = [next(steps).token_id for _ in range(9)]
    steps.close()
    assert subject.tokens[14:].tolist() == taken[:-1]
    assert subject.position == 14 + 8


# On a real graph: rings that wrap, rejected drafts


@pytest.mark.parametrize("spec", [tiny_spec(window=7), tiny_spec()], ids=["window", "full"])
def test_rejected_drafts_leave_the_ring_exact(spec: ModelSpec) -> None:
    prompt = [3, 9, 4, 1, 5] * 4
    texts = []
    for speculate in (0, 5):
        session = tiny.session(spec)
        ring = Ring(spec, RingSpec(chunk=6, context=160))
        subject = Generator(session, ring, spec.vocab_size)
        params = SamplingParams(temperature=0.05, top_k=3, seed=1)
        steps = subject.generate(subject.feed(prompt), params, max_new_tokens=120,
                                 speculate=speculate)  # fmt: skip
        texts.append([one.token_id for one in steps])
    assert texts[0] == texts[1]


# Looking up


def test_a_draft_is_the_most_recent_continuation() -> None:
    lookup = PromptLookup(array("i", [1, 2, 3, 7, 7, 1, 2, 3, 8, 9, 6, 1, 2]), 2)
    assert lookup.draft(3, 10) == [8, 9]
    assert lookup.draft(5, 10) == [], "1 2 5 has not been seen"
    assert lookup.draft(3, 1) == [8]
    assert lookup.draft(3, 0) == []


def test_a_draft_can_continue_into_itself() -> None:
    lookup = PromptLookup(array("i", [4, 5, 4, 5, 4]), 6)
    lookup.learn(8, 8)
    assert lookup.draft(5, 10) == [4, 5, 4, 5, 4, 5]


def test_drafts_grow_when_right_and_pause_when_wrong() -> None:
    tokens = array("i", [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2])
    lookup = PromptLookup(tokens, 8)
    lengths = []
    for _ in range(3):
        lengths.append(len(lookup.draft(3, 10)))
        lookup.learn(lengths[-1], lengths[-1])
    assert lengths == [3, 5, 8]
    waits, lengths = [], []
    for _ in range(16):
        lookup.learn(8, 0)
        found = ((i, lookup.draft(3, 10)) for i in range(1, 1000))
        wait, draft = next((i, draft) for i, draft in found if draft)
        waits.append(wait)
        lengths.append(len(draft))
    assert lengths == [8, 4, 3, 2, 1, 1, 1, 1, 1, *[PROBE_TOKENS] * 7]
    assert waits == [*[1] * 9, 2, 4, 8, 16, 32, 64, 64]
    assert LONGEST_PAUSE == 64


@pytest.mark.parametrize("right", [0, 8])
def test_after_a_long_uniform_text_drafts_are_still_made(right: int) -> None:
    lookup = PromptLookup(array("i", [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2]), 8)
    for _ in range(5000):
        lookup.learn(8, right)
    lengths = [len(lookup.draft(3, 10)) for _ in range(LONGEST_PAUSE)]
    assert max(lengths) == (8 if right else PROBE_TOKENS)


def test_only_tokens_worth_their_cost_are_drafted() -> None:
    lookup = PromptLookup(array("i", [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2]), 50)
    assert (
        FIRST_SHARE ** len(lookup.draft(3, 50))
        > COST
        > FIRST_SHARE ** (len(lookup.draft(3, 50)) + 1)
    )


@pytest.mark.parametrize("count", range(NGRAM + 1))
def test_too_short_a_text_gives_no_draft(count: int) -> None:
    assert PromptLookup(array("i", [1] * count), 4).draft(2, 10) == []
