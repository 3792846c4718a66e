"""The generation loop against a scripted session: no model, no graph, nothing random.

The script says what the "model" answers at each position, so every step that the generator takes,
and every logit it reads, can be written down beforehand.
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
    """Answers `script(position)` with the highest logit, and notes everything it was asked."""

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
        assert input_ids.flags.c_contiguous, "a session binds the array's memory as it lies"
        self.steps.append((input_ids[0].tolist(), position_ids[0].tolist()))
        self.indices.append(logits_indices[0].tolist())
        self.logits[:] = np.arange(VOCABULARY) / VOCABULARY  # a shape that sampling can tell
        self.logits[0, 0, self.script(int(position_ids[0, logits_indices[0, 0]]))] = 5
        return self.logits


def counting(position: int) -> int:
    """After the token at position p comes token p + 1."""
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


def test_a_prompt_is_fed_in_pieces_and_only_the_last_token_of_each_gives_logits():
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
    told: list[int] = []
    subject.feed([1] * 10, told.append)
    assert told == [4, 4, 2]


def test_the_session_grows_before_the_step_that_needs_the_room():
    subject, session = generator(context=40, chunk=4)
    events = []
    resize, step = session.resize, session.step

    def noted_step(*arrays: Ids) -> Logits:
        events.append(("step", int(arrays[1][0, -1])))
        return step(*arrays)

    def noted_resize(capacities: Mapping[int | None, int]) -> None:
        events.append(("resize", capacities[None]))
        resize(capacities)

    session.step, session.resize = noted_step, noted_resize  # type: ignore[method-assign]
    subject.feed([1] * 9)
    assert events == [
        ("step", 3), ("resize", 8), ("step", 7), ("resize", 16), ("step", 8),
    ]  # fmt: skip


def test_no_token_is_no_turn():
    subject, session = generator()
    with pytest.raises(MistralcError, match="at least one"):
        subject.feed([])
    assert not session.steps


@pytest.mark.parametrize("wrong", [-1, VOCABULARY])
def test_a_token_that_the_model_does_not_have_is_refused_before_anything_is_written(wrong: int):
    subject, session = generator(chunk=2)
    with pytest.raises(MistralcError, match=f"Token {wrong} was given; .* 0 to 49"):
        subject.feed([1, 2, 3, wrong])
    assert not session.steps
    assert (subject.position, list(subject.tokens)) == (0, [])


def test_too_long_a_prompt_is_refused_before_anything_is_written():
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


def test_every_sampled_token_but_the_last_is_written_at_the_next_position():
    subject, session = generator()
    logits = subject.feed([7, 7, 7])
    session.steps.clear()
    assert ids_of(subject.generate(logits, GREEDY, max_new_tokens=4)) == [3, 4, 5, 6]
    assert session.steps == [([3], [3]), ([4], [4]), ([5], [5])]
    assert list(subject.tokens) == [7, 7, 7, 3, 4, 5]
    assert subject.position == 6


def test_one_token_is_sampled_from_the_prompt_alone():
    subject, session = generator()
    logits = subject.feed([7])
    session.steps.clear()
    assert ids_of(subject.generate(logits, GREEDY, max_new_tokens=1)) == [1]
    assert not session.steps


def test_the_turn_goes_on_from_the_last_token():
    subject, session = generator()
    *_, last = subject.generate(subject.feed([7, 7]), GREEDY, max_new_tokens=3)
    session.steps.clear()
    logits = subject.feed([last.token_id, 20, 21])
    assert session.steps == [([4, 20, 21], [4, 5, 6])]
    assert ids_of(subject.generate(logits, GREEDY, max_new_tokens=2)) == [7, 8]


def test_it_ends_with_length_after_so_many_tokens():
    subject, _ = generator()
    steps = subject.generate(subject.feed([7]), GREEDY, max_new_tokens=2)
    next(steps)
    assert subject.finish_reason is None
    next(steps)
    assert subject.finish_reason == "length"
    assert next(steps, None) is None


def test_it_ends_with_stop_at_a_stop_id_which_is_the_last_token_given():
    subject, _ = generator()
    logits = subject.feed([7])
    found = ids_of(subject.generate(logits, GREEDY, max_new_tokens=9, stop_ids=frozenset({3, 30})))
    assert found == [1, 2, 3]
    assert subject.finish_reason == "stop"


def test_a_stop_id_that_is_also_the_last_token_allowed_is_a_stop():
    subject, _ = generator()
    logits = subject.feed([7])
    list(subject.generate(logits, GREEDY, max_new_tokens=3, stop_ids=frozenset({3})))
    assert subject.finish_reason == "stop"


def test_a_full_context_ends_with_length_and_its_last_token_needs_no_place():
    subject, _ = generator(context=6)
    found = ids_of(subject.generate(subject.feed([7] * 4), GREEDY))
    assert found == [4, 5, 6]  # at positions 4 and 5, and one that is never written
    assert subject.finish_reason == "length"
    assert subject.position == 6


def test_a_context_filled_by_the_prompt_still_gives_one_token():
    subject, _ = generator(context=6)
    found = ids_of(subject.generate(subject.feed([7] * 6), GREEDY, max_new_tokens=5))
    assert found == [6]
    assert subject.finish_reason == "length"


def test_a_sliding_model_has_no_end():
    subject, _ = generator(window=4, chunk=3, script=lambda position: position % 10)
    steps = subject.generate(subject.feed([7]), GREEDY)
    assert len(ids_of(islice(steps, 1000))) == 1000
    assert subject.finish_reason is None


def test_no_new_token_asked_for_is_none_given():
    subject, _ = generator()
    steps = subject.generate(subject.feed([7]), GREEDY, max_new_tokens=0)
    assert ids_of(islice(steps, 20)) == []


def test_a_caller_that_stops_listening_leaves_a_sequence_that_goes_on():
    subject, session = generator()
    steps = subject.generate(subject.feed([7]), GREEDY)
    assert ids_of(islice(steps, 3)) == [1, 2, 3]
    steps.close()  # type: ignore[attr-defined]
    session.steps.clear()
    subject.feed([3, 30])
    assert session.steps == [([3, 30], [3, 4])]


# Going back


def test_going_back_forgets_the_tokens_from_there_on():
    subject, session = generator()
    subject.feed([1, 2, 3, 4, 5])
    subject.rewind(2)
    assert (subject.position, list(subject.tokens)) == (2, [1, 2])
    session.steps.clear()
    subject.feed([9])
    assert session.steps == [([9], [2])]


def test_going_back_too_far_changes_nothing():
    subject, _ = generator(window=4, chunk=3)
    subject.feed(list(range(10)))
    with pytest.raises(MistralcError, match="Start over"):
        subject.rewind(6)
    assert (subject.position, list(subject.tokens)) == (10, list(range(10)))


def test_a_text_with_a_common_beginning_is_fed_from_where_it_parts():
    subject, session = generator()
    subject.feed([1, 2, 3, 4, 5])
    session.steps.clear()
    logits = subject.feed_from_common_prefix([1, 2, 3, 30, 31])
    assert session.steps == [([30, 31], [3, 4])]
    assert list(subject.tokens) == [1, 2, 3, 30, 31]
    assert int(np.argmax(logits)) == counting(4)


def test_a_longer_text_is_fed_from_where_the_ring_ends():
    subject, session = generator()
    subject.feed([1, 2, 3])
    session.steps.clear()
    subject.feed_from_common_prefix([1, 2, 3, 4])
    assert session.steps == [([4], [3])]


@pytest.mark.parametrize("text", [[1, 2, 3], [1, 2]], ids=["the same text", "its beginning"])
def test_a_text_that_is_there_already_is_fed_its_last_token_for_the_logits(text: list[int]):
    subject, session = generator()
    subject.feed([1, 2, 3])
    session.steps.clear()
    logits = subject.feed_from_common_prefix(text)
    assert session.steps == [([text[-1]], [len(text) - 1])]
    assert list(subject.tokens) == text
    assert int(np.argmax(logits)) == counting(len(text) - 1)


def test_a_text_that_shares_nothing_starts_over():
    subject, session = generator()
    subject.feed([1, 2, 3])
    session.steps.clear()
    subject.feed_from_common_prefix([4, 5])
    assert session.steps == [([4, 5], [0, 1])]


def test_a_beginning_that_the_ring_has_forgotten_is_fed_again():
    subject, session = generator(window=4, chunk=3)
    subject.feed(list(range(20)))  # holds 14..19, and goes back to 17
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
    # 1 would be next; it is in the prompt, so its 5 becomes 0.05, below 49's 49/50.
    assert ids_of(subject.generate(subject.feed([1]), params, max_new_tokens=1)) == [49]


def test_log_probabilities_come_where_they_are_asked_for():
    subject, _ = generator()
    logits = subject.feed([7]).copy()
    (plain,) = subject.generate(logits, GREEDY, max_new_tokens=1)
    assert plain.logprob is None
    params = SamplingParams(temperature=0, logprobs=2)
    (told,) = subject.generate(logits, params, max_new_tokens=1)
    wide = logits.astype(np.float64)
    expected = wide[1] - np.log(np.exp(wide).sum())
    # Float64 on both sides; 1e-9 is far above its rounding and far below any mistake.
    assert told.logprob == pytest.approx(expected, abs=1e-9)
    assert [token for token, _ in told.top_logprobs] == [1, 49]


def test_a_seed_draws_what_the_sampler_draws_from_the_same_logits():
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
    assert len(set(drawn)) > 3, "at temperature 2 a draw is not the likeliest token every time"


def test_wrong_sampling_parameters_are_refused_when_they_are_made():
    with pytest.raises(UsageError, match="temperature"):
        SamplingParams(temperature=-1)
