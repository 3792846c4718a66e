"""The generation loop on a scripted session: no model, no graph, nothing random.

The script gives the "model's" next token at each position, so a test can state every step that the
generator takes and every logit that it reads.
"""

from collections.abc import Callable, Mapping
from itertools import islice

import numpy as np
import pytest

from graphs.errors import MistralcError, UsageError
from graphs.spec import RingSpec
from runtime.backends.session import Ids, Logits
from runtime.decoding.generator import Generator
from runtime.decoding.ring import ContextFullError, Ring
from runtime.decoding.sampling import Sampler, SamplingParams
from tests.support.make_checkpoint import tiny_spec

VOCABULARY = 50
GREEDY = SamplingParams(temperature=0)


class ScriptedSession:
    """Gives the token `script(position)` the highest logit and records all calls."""

    def __init__(self, script: Callable[[int], int]) -> None:
        self.script = script
        self.steps: list[tuple[list[int], list[int]]] = []  # ids, positions
        self.indices: list[list[int]] = []
        self.sizes: list[dict[int | None, int]] = []
        self.logits = np.zeros((1, 1, VOCABULARY), np.float32)

    def resize(self, capacities: Mapping[int | None, int]) -> None:
        self.sizes.append(dict(capacities))

    def step(self, input_ids: Ids, position_ids: Ids, logits_indices: Ids) -> Logits:
        assert input_ids.dtype == position_ids.dtype == logits_indices.dtype == np.int64
        assert input_ids.flags.c_contiguous, "a session binds the memory of the array"
        self.steps.append((input_ids[0].tolist(), position_ids[0].tolist()))
        self.indices.append(logits_indices[0].tolist())
        self.logits[:] = (
            np.arange(VOCABULARY) / VOCABULARY
        )  # distinct logits, so that sampling is testable
        self.logits[0, 0, self.script(int(position_ids[0, logits_indices[0, 0]]))] = 5
        return self.logits


def counting(position: int) -> int:
    """The token after position p is p + 1."""
    return position + 1


def generator(
    *, window: int | None = None, context: int = 40, chunk: int = 4,
    script: Callable[[int], int] = counting,
) -> tuple[Generator, ScriptedSession]:  # fmt: skip
    session = ScriptedSession(script)
    ring = Ring(tiny_spec(window=window), RingSpec(chunk=chunk, context=context))
    return Generator(session, ring, VOCABULARY), session


def ids_of(sampled: object) -> list[int]:
    return [s.token_id for s in sampled]  # type: ignore[attr-defined]


# Feeding


def test_a_prompt_is_fed_in_pieces_with_logits_for_the_last_token_of_each():
    subject, session = generator(chunk=4)
    logits = subject.feed([9, 8, 7, 6, 5, 4])
    assert session.steps == [([9, 8, 7, 6], [0, 1, 2, 3]), ([5, 4], [4, 5])]
    assert session.indices == [[3], [1]]
    assert int(np.argmax(logits)) == counting(5)
    assert logits.shape == (VOCABULARY,)


def test_pieces_are_cut_at_the_end_of_the_ring():
    subject, session = generator(window=4, chunk=3)  # 6 slots
    subject.feed([1] * 5)
    session.steps.clear()
    subject.feed([2] * 5)
    assert [positions for _, positions in session.steps] == [[5], [6, 7, 8], [9]]


def test_progress_adds_up_to_the_prompt():
    subject, _ = generator(chunk=4)
    counts: list[int] = []
    subject.feed([1] * 10, counts.append)
    assert counts == [4, 4, 2]


def test_the_session_is_resized_before_the_step_that_needs_the_slots():
    subject, session = generator(context=40, chunk=4)
    events = []
    resize, step = session.resize, session.step

    def recorded_step(*arrays: Ids) -> Logits:
        events.append(("step", int(arrays[1][0, -1])))
        return step(*arrays)

    def recorded_resize(capacities: Mapping[int | None, int]) -> None:
        events.append(("resize", capacities[None]))
        resize(capacities)

    session.step, session.resize = recorded_step, recorded_resize  # type: ignore[method-assign]
    subject.feed([1] * 9)
    assert events == [
        ("step", 3), ("resize", 8), ("step", 7), ("resize", 16), ("step", 8),
    ]  # fmt: skip


def test_an_empty_turn_is_refused():
    subject, session = generator()
    with pytest.raises(MistralcError, match="at least one"):
        subject.feed([])
    assert not session.steps


@pytest.mark.parametrize("wrong", [-1, VOCABULARY])
def test_an_unknown_token_is_refused_before_anything_is_written(wrong: int):
    subject, session = generator(chunk=2)
    with pytest.raises(MistralcError, match=f"Token {wrong} was given; .* 0 to 49"):
        subject.feed([1, 2, 3, wrong])
    assert not session.steps
    assert (subject.position, list(subject.tokens)) == (0, [])


def test_a_prompt_that_exceeds_the_context_is_refused_before_anything_is_written():
    subject, session = generator(context=10, chunk=4)
    subject.feed([1, 2, 3])
    session.steps.clear()
    with pytest.raises(ContextFullError, match=r"8 tokens .* position 3, .* holds 10 in all"):
        subject.feed([4] * 8)
    assert not session.steps
    assert (subject.position, list(subject.tokens)) == (3, [1, 2, 3])
    subject.feed([4] * 7)
    assert subject.position == 10


# Generating


def test_all_sampled_tokens_but_the_last_are_written():
    subject, session = generator()
    logits = subject.feed([7, 7, 7])
    session.steps.clear()
    assert ids_of(subject.generate(logits, GREEDY, max_new_tokens=4)) == [3, 4, 5, 6]
    assert session.steps == [([3], [3]), ([4], [4]), ([5], [5])]
    assert list(subject.tokens) == [7, 7, 7, 3, 4, 5]
    assert subject.position == 6


def test_the_first_token_needs_no_step_after_the_prompt():
    subject, session = generator()
    logits = subject.feed([7])
    session.steps.clear()
    assert ids_of(subject.generate(logits, GREEDY, max_new_tokens=1)) == [1]
    assert not session.steps


def test_the_next_turn_continues_after_the_last_token():
    subject, session = generator()
    *_, last = subject.generate(subject.feed([7, 7]), GREEDY, max_new_tokens=3)
    session.steps.clear()
    logits = subject.feed([last.token_id, 20, 21])
    assert session.steps == [([4, 20, 21], [4, 5, 6])]
    assert ids_of(subject.generate(logits, GREEDY, max_new_tokens=2)) == [7, 8]


def test_generation_ends_with_length_after_max_new_tokens():
    subject, _ = generator()
    steps = subject.generate(subject.feed([7]), GREEDY, max_new_tokens=2)
    next(steps)
    assert subject.finish_reason is None
    next(steps)
    assert subject.finish_reason == "length"
    assert next(steps, None) is None


def test_generation_ends_with_stop_after_yielding_the_stop_id():
    subject, _ = generator()
    logits = subject.feed([7])
    found = ids_of(subject.generate(logits, GREEDY, max_new_tokens=9, stop_ids=frozenset({3, 30})))
    assert found == [1, 2, 3]
    assert subject.finish_reason == "stop"


def test_a_stop_id_at_max_new_tokens_counts_as_stop():
    subject, _ = generator()
    logits = subject.feed([7])
    list(subject.generate(logits, GREEDY, max_new_tokens=3, stop_ids=frozenset({3})))
    assert subject.finish_reason == "stop"


def test_generation_ends_with_length_at_the_end_of_the_context():
    subject, _ = generator(context=6)
    found = ids_of(subject.generate(subject.feed([7] * 4), GREEDY))
    assert found == [4, 5, 6]  # at positions 4 and 5; the last one is never written
    assert subject.finish_reason == "length"
    assert subject.position == 6


def test_a_prompt_that_fills_the_context_still_gives_one_token():
    subject, _ = generator(context=6)
    found = ids_of(subject.generate(subject.feed([7] * 6), GREEDY, max_new_tokens=5))
    assert found == [6]
    assert subject.finish_reason == "length"


def test_a_sliding_model_generates_without_end():
    subject, _ = generator(window=4, chunk=3, script=lambda position: position % 10)
    steps = subject.generate(subject.feed([7]), GREEDY)
    assert len(ids_of(islice(steps, 1000))) == 1000
    assert subject.finish_reason is None


def test_zero_new_tokens_give_no_token():
    subject, _ = generator()
    steps = subject.generate(subject.feed([7]), GREEDY, max_new_tokens=0)
    assert ids_of(islice(steps, 20)) == []


def test_a_sequence_can_continue_after_the_caller_stopped_early():
    subject, session = generator()
    steps = subject.generate(subject.feed([7]), GREEDY)
    assert ids_of(islice(steps, 3)) == [1, 2, 3]
    steps.close()  # type: ignore[attr-defined]
    session.steps.clear()
    subject.feed([3, 30])
    assert session.steps == [([3, 30], [3, 4])]


# Rewinding


def test_rewinding_drops_the_tokens_after_the_new_position():
    subject, session = generator()
    subject.feed([1, 2, 3, 4, 5])
    subject.rewind(2)
    assert (subject.position, list(subject.tokens)) == (2, [1, 2])
    session.steps.clear()
    subject.feed([9])
    assert session.steps == [([9], [2])]


def test_a_refused_rewind_changes_nothing():
    subject, _ = generator(window=4, chunk=3)
    subject.feed(list(range(10)))
    with pytest.raises(MistralcError, match="Start over"):
        subject.rewind(6)
    assert (subject.position, list(subject.tokens)) == (10, list(range(10)))


def test_only_the_tokens_after_a_common_prefix_are_fed():
    subject, session = generator()
    subject.feed([1, 2, 3, 4, 5])
    session.steps.clear()
    logits = subject.feed_from_common_prefix([1, 2, 3, 30, 31])
    assert session.steps == [([30, 31], [3, 4])]
    assert list(subject.tokens) == [1, 2, 3, 30, 31]
    assert int(np.argmax(logits)) == counting(4)


def test_an_extended_text_is_fed_from_the_end_of_the_ring():
    subject, session = generator()
    subject.feed([1, 2, 3])
    session.steps.clear()
    subject.feed_from_common_prefix([1, 2, 3, 4])
    assert session.steps == [([4], [3])]


@pytest.mark.parametrize("text", [[1, 2, 3], [1, 2]], ids=["the same text", "a prefix of it"])
def test_a_text_already_in_the_ring_is_fed_its_last_token_for_the_logits(text: list[int]):
    subject, session = generator()
    subject.feed([1, 2, 3])
    session.steps.clear()
    logits = subject.feed_from_common_prefix(text)
    assert session.steps == [([text[-1]], [len(text) - 1])]
    assert list(subject.tokens) == text
    assert int(np.argmax(logits)) == counting(len(text) - 1)


def test_a_text_without_a_common_prefix_is_fed_from_position_0():
    subject, session = generator()
    subject.feed([1, 2, 3])
    session.steps.clear()
    subject.feed_from_common_prefix([4, 5])
    assert session.steps == [([4, 5], [0, 1])]


def test_a_prefix_that_the_ring_has_overwritten_is_fed_again():
    subject, session = generator(window=4, chunk=3)
    subject.feed(list(range(20)))  # holds 14..19; can rewind to 17
    session.steps.clear()
    subject.feed_from_common_prefix([*range(17), 40])
    assert session.steps[-1] == ([40], [17]), "17 is within the slack"
    assert len(session.steps) == 1
    session.steps.clear()
    subject.feed_from_common_prefix([*range(10), 41])
    assert [p for _, positions in session.steps for p in positions] == list(range(11))


# Sampling


def test_logit_bias_reaches_the_sampler():
    subject, _ = generator()
    params = SamplingParams(temperature=0, logit_bias={33: 100.0})
    assert ids_of(subject.generate(subject.feed([7]), params, max_new_tokens=2)) == [33, 33]


def test_the_repetition_penalty_sees_the_prompt():
    subject, _ = generator()
    params = SamplingParams(temperature=0, repetition_penalty=100.0)
    # Token 1 would be next, but it is in the prompt: its logit 5 becomes 0.05, below 49/50 of 49.
    assert ids_of(subject.generate(subject.feed([1]), params, max_new_tokens=1)) == [49]


def test_log_probabilities_are_given_on_request():
    subject, _ = generator()
    logits = subject.feed([7]).copy()
    (plain,) = subject.generate(logits, GREEDY, max_new_tokens=1)
    assert plain.logprob is None
    params = SamplingParams(temperature=0, logprobs=2)
    (sampled,) = subject.generate(logits, params, max_new_tokens=1)
    wide = logits.astype(np.float64)
    expected = wide[1] - np.log(np.exp(wide).sum())
    # Float64 on both sides: 1e-9 is far above its rounding.
    assert sampled.logprob == pytest.approx(expected, abs=1e-9)
    assert [token for token, _ in sampled.top_logprobs] == [1, 49]


def test_a_seed_gives_the_draws_of_the_sampler():
    params = SamplingParams(temperature=2.0, seed=11)
    subject, session = generator()
    drawn = ids_of(subject.generate(subject.feed([7]), params, max_new_tokens=12))
    sampler = Sampler(params, VOCABULARY, [7])
    expected = []
    for position in range(12):
        zero = np.zeros((1, 1), np.int64)
        logits = session.step(zero, zero + position, zero)[0, 0]
        expected.append(sampler.sample(logits).token_id)
    assert drawn == expected
    assert len(set(drawn)) > 3, "at temperature 2 not every draw is the likeliest token"


def test_invalid_sampling_parameters_are_refused():
    with pytest.raises(UsageError, match="temperature"):
        SamplingParams(temperature=-1)
