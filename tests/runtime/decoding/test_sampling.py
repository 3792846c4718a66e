import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from graphs.errors import MistralcError, UsageError
from runtime.decoding.sampling import Sampler, SamplingParams, _draw

Row = NDArray[np.float32]

# Our weights and a reference's are both float64. They round differently: two parts in 2^53 in a
# scaled score are at most 2e-13 in its exponential, which is 0 beyond a score of -745.
DOUBLE = 1e-12


def row_of(kind: str, size: int, seed: int) -> Row:
    random = np.random.default_rng(seed)
    if kind == "peaked":
        logits = random.permutation(-1.5 * np.log(np.arange(1, size + 1)))
    elif kind == "tied":
        logits = np.round(random.normal(size=size) * 4) / 2  # some twenty values for all tokens
    else:
        logits = random.normal(size=size) * 3
    row = logits.astype(np.float32)
    row.flags.writeable = False  # writing to the caller's row would raise, in every test
    return row


def sampler(size: int, context: tuple[int, ...] = (), **options: Any) -> Sampler:
    return Sampler(SamplingParams(**options), size, context)


def dense(ours: Sampler, row: Row) -> NDArray[np.float64]:
    ids, probabilities = ours.distribution(row)
    assert np.all(np.diff(ids) > 0)
    assert np.all(probabilities > 0)
    out = np.zeros(row.size)
    out[ids] = probabilities
    return out


def theirs(row: Row, processors: list[LogitsProcessor]) -> NDArray[np.float64]:
    """Probabilities by transformers in float64, so that only the definition can differ."""
    scores = torch.tensor(row, dtype=torch.float64)[None]
    for processor in processors:
        scores = processor(torch.zeros((1, 0), dtype=torch.long), scores)
    return scores.softmax(-1)[0].numpy()


ROWS = [
    pytest.param(kind, size, id=f"{kind}-{size}")
    for kind in ("peaked", "normal", "tied")
    for size in (7, 1000, 32_768)
]


@pytest.mark.parametrize(("kind", "size"), ROWS)
@pytest.mark.parametrize(
    ("options", "processors"),
    [
        ({}, []),
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"temperature": 1.9}, [TemperatureLogitsWarper(1.9)]),
        ({"top_k": 1}, [TopKLogitsWarper(1)]),
        ({"top_k": 50}, [TopKLogitsWarper(50)]),
        ({"top_k": 300}, [TopKLogitsWarper(300)]),
        ({"top_k": 20_000}, [TopKLogitsWarper(20_000)]),
        ({"min_p": 0.05}, [MinPLogitsWarper(0.05)]),
        ({"min_p": 1.0}, [MinPLogitsWarper(1.0)]),
        (
            {"temperature": 0.8, "top_k": 40, "min_p": 0.02},
            [TemperatureLogitsWarper(0.8), TopKLogitsWarper(40), MinPLogitsWarper(0.02)],
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",  # a processor's is its address
)
def test_truncations_equal_those_of_transformers_ties_included(
    kind: str, size: int, options: dict[str, Any], processors: list[LogitsProcessor]
) -> None:
    row = row_of(kind, size, seed=size)
    ours, reference = dense(sampler(size, **options), row), theirs(row, processors)
    assert np.array_equal(ours > 0, reference > 0)
    np.testing.assert_allclose(ours, reference, rtol=DOUBLE)


@pytest.mark.parametrize(("kind", "size"), ROWS)
@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.05},
        {"top_p": 0.9},
        {"top_p": 0.999},
        {"top_p": 0.95, "temperature": 2.0},
        {"top_p": 0.95, "temperature": 0.8, "top_k": 50},
        {"top_p": 0.95, "temperature": 0.8, "min_p": 0.1},
        {"top_p": 0.6, "temperature": 1.3, "top_k": 200, "min_p": 0.05},
    ],
    ids=str,
)
def test_a_nucleus_equals_that_of_transformers_but_for_which_of_tied_tokens_enter(
    kind: str, size: int, options: dict[str, Any]
) -> None:
    row = row_of(kind, size, seed=size + 1)
    processors: list[LogitsProcessor] = [TemperatureLogitsWarper(options.get("temperature", 1.0))]
    if "top_k" in options:
        processors.append(TopKLogitsWarper(options["top_k"]))
    processors.append(TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        processors.append(MinPLogitsWarper(options["min_p"]))
    ours, reference = dense(sampler(size, **options), row), theirs(row, processors)
    np.testing.assert_allclose(np.sort(ours), np.sort(reference), rtol=DOUBLE)
    least = row[ours > 0].min()
    assert np.array_equal((ours > 0) & (row > least), (reference > 0) & (row > least))
    tied = np.flatnonzero(row == least)
    entered = ours[tied] > 0
    assert np.all(entered[:-1] >= entered[1:])  # the lowest ids first
    if kind != "tied":
        assert np.array_equal(ours > 0, reference > 0)


def by_definition(row: Row, params: SamplingParams) -> NDArray[np.float64]:
    """Temperature, top-k, top-p and min-p by one full sort, as plainly as they can be written."""
    z = (row.astype(np.float64) - float(row.max())) / params.temperature
    order = np.lexsort((np.arange(row.size), -z))
    weights = np.exp(z[order])
    if params.top_k:
        weights[z[order] < z[order][min(params.top_k, row.size) - 1]] = 0
    before = np.concatenate(([0.0], weights.cumsum()[:-1]))
    kept = weights >= params.min_p
    if params.top_p < 1:
        kept &= before < params.top_p * weights.sum()
    kept[0] = True
    out = np.zeros(row.size)
    out[order[kept]] = weights[kept] / weights[kept].sum()
    return out


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([1, 2, 3, 511, 1024, 1025, 5000]),
    spread=st.sampled_from([0.0, 0.01, 1.0, 5.0, 50.0]),
    step=st.sampled_from([0.0, 0.5, 3.0]),
    banned=st.sampled_from([0.0, 0.5, 0.99]),
    temperature=st.sampled_from([1e-320, 1e-3, 0.31, 1.0, 7.3]),
    top_k=st.sampled_from([0, 1, 2, 37, 128, 129, 600, 9999]),
    top_p=st.sampled_from([0.0, 1e-9, 0.313, 0.9017, 0.999983, 1.0]),
    min_p=st.sampled_from([0.0, 1e-300, 0.0613, 1.0]),
)
def test_every_short_cut_gives_what_a_full_sort_gives(
    seed: int, size: int, spread: float, step: float, banned: float, **options: Any
) -> None:
    random = np.random.default_rng(seed)
    logits = random.normal(size=size) * spread
    if step:
        logits = np.round(logits / step) * step
    logits[random.random(size) < banned] = -np.inf
    logits[random.integers(size)] = 1.0
    params = SamplingParams(**options)
    row = logits.astype(np.float32)
    with np.errstate(over="ignore"):  # the reference divides by a temperature of 1e-320
        reference = by_definition(row, params)
    ids, probabilities = Sampler(params, size).distribution(row)
    ours = np.zeros(size)
    ours[ids] = probabilities
    # Relative as above. Below 1e-300 float64 loses digits, until nothing is left.
    np.testing.assert_allclose(ours, reference, rtol=DOUBLE, atol=1e-300)


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_the_repetition_penalty_equals_that_of_transformers(penalty: float) -> None:
    row, prompt = row_of("normal", 1000, seed=3), (5, 5, 17, 999, 0)
    ours = sampler(1000, prompt, repetition_penalty=penalty)
    ours.observe(400)
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    scores = processor(torch.tensor([[*prompt, 400]]), torch.tensor(row)[None])
    expected = scores[0].double().softmax(-1).numpy()
    # Penalized in float32 by both with the same operation, so only the float64 softmax differs.
    np.testing.assert_allclose(dense(ours, row), expected, rtol=DOUBLE)


def test_presence_and_frequency_count_generated_tokens_and_not_the_prompt() -> None:
    row = np.zeros(8, dtype=np.float32)
    ours = sampler(8, (1, 1, 1), presence_penalty=0.5, frequency_penalty=0.25)
    for token_id in (2, 3, 3):
        ours.observe(token_id)
    expected = np.exp(-np.array([0, 0, 0.75, 1.0, 0, 0, 0, 0]))
    # The penalties are exact in float32; see DOUBLE.
    np.testing.assert_allclose(dense(ours, row), expected / expected.sum(), rtol=DOUBLE)


def test_logit_bias_comes_before_the_repetition_penalty() -> None:
    row = np.array([1.0, 0.0], dtype=np.float32)
    ours = sampler(2, (0,), repetition_penalty=2.0, logit_bias={0: -3.0}, logprobs=2, temperature=0)
    sampled = ours.sample(row)  # (1 - 3) * 2 = -4; the other order would give 1 / 2 - 3 = -2.5
    assert sampled.token_id == 1
    # Scores are exact in float32; the logarithm of a sum is good to a few parts in 2^53.
    assert dict(sampled.top_logprobs)[0] == pytest.approx(-4 - math.log1p(math.exp(-4)), rel=1e-14)


def test_sampling_counts_its_own_tokens() -> None:
    ours = sampler(4, temperature=0, frequency_penalty=1.0)
    row = np.array([2.5, 2.0, 0.0, 0.0], dtype=np.float32)
    assert [ours.sample(row).token_id for _ in range(5)] == [0, 1, 0, 1, 0]


def test_greedy_takes_the_lowest_id_of_tied_tokens_and_no_random_number() -> None:
    row = np.array([0.0, 3.0, 3.0, -1.0], dtype=np.float32)
    ours = sampler(4, temperature=0, seed=7)
    state = ours._bits.state
    assert ours.sample(row).token_id == 1
    assert ours._bits.state == state
    ids, probabilities = ours.distribution(row)
    assert (ids.tolist(), probabilities.tolist()) == ([1], [1.0])


def test_a_seed_gives_the_same_tokens_always_and_everywhere() -> None:
    ranks = 1 + np.arange(32_768) * 7919 % 32_768  # a shuffle that needs no random numbers
    row = (-0.3 * np.log(ranks)).astype(np.float32)
    ours = sampler(row.size, temperature=0.8, top_k=50, top_p=0.95, seed=1234)
    assert [ours.sample(row).token_id for _ in range(8)] == [
        29197,
        8702,
        28837,
        4771,
        8342,
        360,
        4531,
        8342,
    ]
    uniform = np.random.Generator(np.random.PCG64(1234)).random()
    assert sampler(4, seed=1234)._uniform() == uniform  # the same stream, read without Generator


def test_a_drawn_seed_repeats_what_it_gave() -> None:
    row = row_of("normal", 1000, seed=1)
    first = sampler(1000)
    again = sampler(1000, seed=first.seed)
    assert [first.sample(row) for _ in range(20)] == [again.sample(row) for _ in range(20)]
    assert first.seed != sampler(1000).seed  # equal once in 2^32


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 20},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.5, "min_p": 0.02},
        {"logit_bias": {3: 4.0, 9: -math.inf}, "top_p": 0.8},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(options: dict[str, Any]) -> None:
    row, draws = row_of("normal", 600, seed=2), 20_000
    ours = sampler(600, seed=5, **options)
    expected = dense(ours, row) * draws
    counts = np.bincount([ours.sample(row).token_id for _ in range(draws)], minlength=600)
    assert np.all(expected[counts > 0] > 0)
    common = expected >= 5  # where the chi-square approximation holds; the rest is one cell
    seen = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    cells = wanted > 0
    statistic = float(((seen - wanted)[cells] ** 2 / wanted[cells]).sum())
    freedom = int(cells.sum()) - 1
    # Mean `freedom`, variance 2 `freedom`: five deviations are passed once in some 10^5 seeds.
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_a_draft_checked_by_sampling_gives_the_text_that_no_draft_gives() -> None:
    rows = [row_of("peaked", 1000, seed=seed) for seed in range(40)]
    options = {"temperature": 0.9, "top_p": 0.9, "frequency_penalty": 0.3, "seed": 3}
    plain = sampler(1000, **options)
    text = [plain.sample(row).token_id for row in rows]
    drafted, checked = sampler(1000, **options), list[int]()
    draft = [token if i % 3 else 0 for i, token in enumerate(text)]  # wrong at every third
    while len(checked) < len(rows):
        for i in range(len(checked), len(rows)):
            drafted.distribution(rows[i])  # looking draws nothing and counts nothing
            checked.append(drafted.sample(rows[i]).token_id)
            if checked[-1] != draft[i]:
                break
    assert checked == text


def test_log_probabilities_are_those_of_the_edited_row_at_temperature_one() -> None:
    row = row_of("tied", 1000, seed=4)
    ours = sampler(1000, temperature=0.3, top_k=2, logit_bias={7: -math.inf}, logprobs=5, seed=0)
    edited = row.astype(np.float64)
    edited[7] = -np.inf
    expected = edited - np.log(np.exp(edited).sum())
    sampled = ours.sample(row)
    order = np.lexsort((np.arange(1000), -edited))[:5]
    assert [token for token, _ in sampled.top_logprobs] == order.tolist()
    # Numbers of about 5 from sums of 1,000: a few units in the last of 53 bits.
    np.testing.assert_allclose([x for _, x in sampled.top_logprobs], expected[order], rtol=1e-13)
    assert sampled.logprob == pytest.approx(expected[sampled.token_id], rel=1e-13)  # as above


def test_log_probabilities_are_given_only_when_asked_for() -> None:
    row = np.array([0.0, 0.0, -np.inf], dtype=np.float32)
    nothing = sampler(3, temperature=0).sample(row)
    assert (nothing.logprob, nothing.top_logprobs) == (None, ())
    own = sampler(3, temperature=0, logprobs=0).sample(row)
    assert own.top_logprobs == ()
    assert own.logprob == pytest.approx(-math.log(2), rel=1e-15)  # one rounding
    many = sampler(3, temperature=0, logprobs=20).sample(row)
    assert [token for token, _ in many.top_logprobs] == [0, 1]  # the banned one is left out


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("edits", [{}, {"logit_bias": {0: 1.0}}])
def test_a_logit_that_is_not_a_number_is_an_error_and_names_its_token(
    bad: float, temperature: float, edits: dict[str, Any]
) -> None:
    row = row_of("normal", 1000, seed=6).copy()
    row[321] = bad
    with pytest.raises(MistralcError, match=r"token 321 is (nan|inf).*mistralc verify"):
        sampler(1000, temperature=temperature, **edits).sample(row)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banning_every_token_is_an_error(temperature: float) -> None:
    bans = dict.fromkeys(range(4), -math.inf)
    with pytest.raises(MistralcError, match="Every token is banned"):
        sampler(4, temperature=temperature, logit_bias=bans).sample(np.zeros(4, dtype=np.float32))


def test_a_banned_token_is_never_drawn_and_a_forced_one_always() -> None:
    row = np.zeros(4, dtype=np.float32)
    banning = sampler(4, logit_bias={1: -math.inf, 2: -100.0}, seed=0)
    assert {banning.sample(row).token_id for _ in range(200)} == {0, 3}
    forcing = sampler(4, logit_bias={2: 100.0}, seed=0)
    assert {forcing.sample(row).token_id for _ in range(200)} == {2}


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 0.0, "repetition_penalty": 1.1, "frequency_penalty": 0.2},
        {},
        {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
        {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "logprobs": 5},
        {"temperature": 0.8, "top_p": 0.95},
        {"min_p": 0.05},
    ],
    ids=str,
)
def test_a_token_costs_no_allocation_of_the_vocabulary_s_length(options: dict[str, Any]) -> None:
    row = row_of("peaked", 49_152, seed=0).copy()  # writable: argmax copies what is not
    ours = sampler(row.size, seed=0, **options)
    ours.sample(row)
    tracemalloc.start()
    ours.sample(row)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A copy of the row is 196,608 bytes and a mask 49,152. The nucleus of such a row is found
    # among some hundred tokens, each with an id and a few float64: 40 KiB leaves room for both.
    assert peak < 40 * 1024


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 1000])
def test_a_draw_finds_the_first_index_whose_cumulative_weight_is_larger(size: int) -> None:
    weights = np.random.default_rng(size).integers(0, 3, size).astype(np.float64)
    weights[size // 2] = 1.0
    edges = weights.cumsum()  # small integers: exact, in any order
    for uniform in (0.0, 0.1, 0.5, 0.77, 1 - 2**-53):
        index = _draw(weights, uniform)
        assert index == int(edges.searchsorted(uniform * edges[-1], side="right"))
        assert weights[index] > 0


def test_the_largest_uniform_number_never_draws_past_the_end() -> None:
    random = np.random.default_rng(0)
    for _ in range(2000):
        weights = np.exp(random.normal(size=random.integers(1, 700)) * 5)
        weights[random.random(weights.size) < 0.5] = 0
        weights[0] = 1e-3
        assert weights[_draw(weights, 1 - 2**-53)] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; a number from 0 to 1000"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": True}, "temperature is True"),
        ({"top_p": 1.5}, "top_p is 1.5; a number from 0 to 1 is expected"),
        ({"min_p": -1}, "min_p is -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"presence_penalty": math.inf}, "presence_penalty is inf"),
        ({"frequency_penalty": None}, "frequency_penalty is None"),
        ({"top_k": -1}, "top_k is -1; a whole number from 0 up is expected .0 is off"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"top_k": None}, "top_k is None"),
        ({"seed": -1}, "seed is -1"),
        ({"logprobs": False}, "logprobs is False"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias maps -1 to 1.0"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias maps '5' to 1.0"),
        ({"logit_bias": {5: math.nan}}, "logit_bias maps 5 to nan"),
        ({"logit_bias": {5: math.inf}}, "logit_bias maps 5 to inf"),
    ],
    ids=str,
)
def test_params_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SamplingParams(**options)


def test_numpy_numbers_are_numbers() -> None:
    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(4), seed=np.int64(1))
    sampled = Sampler(params, 8).sample(np.zeros(8, dtype=np.float32))
    assert type(sampled.token_id) is int


def test_changing_the_mapping_one_gave_changes_no_params() -> None:
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[1] = -5.0
    assert params.logit_bias == {1: 2.0}
    assert hash(params) == hash(SamplingParams(logit_bias={1: 2.0}))


@pytest.mark.parametrize(
    ("options", "context"), [({"logit_bias": {10: 1.0}}, ()), ({}, (3, 10)), ({}, (-1,))]
)
def test_a_token_that_the_model_does_not_have_is_refused(
    options: dict[str, Any], context: tuple[int, ...]
) -> None:
    with pytest.raises(UsageError, match="this model's tokens are 0 to 9"):
        sampler(10, context, **options)


@pytest.mark.parametrize(
    "row", [np.zeros(9, np.float32), np.zeros((1, 10), np.float32), np.zeros(10, np.float16)]
)
def test_anything_but_one_float32_row_is_refused(row: Row) -> None:
    with pytest.raises(ValueError, match=r"one row of float32 \[10\] is expected"):
        sampler(10).sample(row)
