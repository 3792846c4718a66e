"""Sampling: penalties, draws and seeds, log-probabilities, refusals, allocations."""

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest

from graphs.errors import MistralcError, UsageError
from runtime.decoding.sampling import _draw
from tests.runtime.decoding.sampling_rows import DOUBLE, Row, dense, row_of, sampler


def test_presence_and_frequency_penalties_count_generated_tokens_only() -> None:
    row = np.zeros(8, dtype=np.float32)
    ours = sampler(8, (1, 1, 1), presence_penalty=0.5, frequency_penalty=0.25)
    for token_id in (2, 3, 3):
        ours.observe(token_id)
    expected = np.exp(-np.array([0, 0, 0.75, 1.0, 0, 0, 0, 0]))
    # The penalties are exact in float32; see DOUBLE.
    np.testing.assert_allclose(dense(ours, row), expected / expected.sum(), rtol=DOUBLE)


def test_logit_bias_is_applied_before_the_repetition_penalty() -> None:
    row = np.array([1.0, 0.0], dtype=np.float32)
    ours = sampler(2, (0,), repetition_penalty=2.0, logit_bias={0: -3.0}, logprobs=2, temperature=0)
    sampled = ours.sample(row)  # (1 - 3) * 2 = -4; the other order would give 1 / 2 - 3 = -2.5
    assert sampled.token_id == 1
    # Scores are exact in float32; the logarithm of a sum is good to a few parts in 2^53.
    assert dict(sampled.top_logprobs)[0] == pytest.approx(-4 - math.log1p(math.exp(-4)), rel=1e-14)


def test_sampled_tokens_count_for_later_penalties() -> None:
    ours = sampler(4, temperature=0, frequency_penalty=1.0)
    row = np.array([2.5, 2.0, 0.0, 0.0], dtype=np.float32)
    assert [ours.sample(row).token_id for _ in range(5)] == [0, 1, 0, 1, 0]


def test_greedy_takes_the_lowest_id_among_ties_and_draws_nothing() -> None:
    row = np.array([0.0, 3.0, 3.0, -1.0], dtype=np.float32)
    ours = sampler(4, temperature=0, seed=7)
    state = ours._bits.state
    assert ours.sample(row).token_id == 1
    assert ours._bits.state == state
    ids, probabilities = ours.distribution(row)
    assert (ids.tolist(), probabilities.tolist()) == ([1], [1.0])


def test_a_seed_gives_the_same_tokens_on_every_machine() -> None:
    ranks = 1 + np.arange(32_768) * 7919 % 32_768  # a permutation without random numbers
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
    assert sampler(4, seed=1234)._uniform() == uniform  # the same stream without Generator


def test_the_drawn_seed_reproduces_the_draws() -> None:
    row = row_of("normal", 1000, seed=1)
    first = sampler(1000)
    again = sampler(1000, seed=first.seed)
    assert [first.sample(row) for _ in range(20)] == [again.sample(row) for _ in range(20)]
    assert first.seed != sampler(1000).seed  # equal with probability 2^-32


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
    common = expected >= 5  # where chi-square holds; all others form one cell
    seen = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    cells = wanted > 0
    statistic = float(((seen - wanted)[cells] ** 2 / wanted[cells]).sum())
    freedom = int(cells.sum()) - 1
    # Mean `freedom`, variance 2 `freedom`: about 1 in 10^5 seeds exceeds five deviations.
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_verifying_a_draft_by_sampling_gives_the_same_text() -> None:
    rows = [row_of("peaked", 1000, seed=seed) for seed in range(40)]
    options = {"temperature": 0.9, "top_p": 0.9, "frequency_penalty": 0.3, "seed": 3}
    plain = sampler(1000, **options)
    text = [plain.sample(row).token_id for row in rows]
    drafted, checked = sampler(1000, **options), list[int]()
    draft = [token if i % 3 else 0 for i, token in enumerate(text)]  # every third token is wrong
    while len(checked) < len(rows):
        for i in range(len(checked), len(rows)):
            drafted.distribution(rows[i])  # does not draw or count
            checked.append(drafted.sample(rows[i]).token_id)
            if checked[-1] != draft[i]:
                break
    assert checked == text


def test_log_probabilities_are_those_of_the_edited_row_at_temperature_1() -> None:
    row = row_of("tied", 1000, seed=4)
    ours = sampler(1000, temperature=0.3, top_k=2, logit_bias={7: -math.inf}, logprobs=5, seed=0)
    edited = row.astype(np.float64)
    edited[7] = -np.inf
    expected = edited - np.log(np.exp(edited).sum())
    sampled = ours.sample(row)
    order = np.lexsort((np.arange(1000), -edited))[:5]
    assert [token for token, _ in sampled.top_logprobs] == order.tolist()
    # Values of about 5 from sums of 1,000 terms: a few units in the last of 53 bits.
    np.testing.assert_allclose([x for _, x in sampled.top_logprobs], expected[order], rtol=1e-13)
    assert sampled.logprob == pytest.approx(expected[sampled.token_id], rel=1e-13)  # as above


def test_log_probabilities_are_given_on_request_only() -> None:
    row = np.array([0.0, 0.0, -np.inf], dtype=np.float32)
    nothing = sampler(3, temperature=0).sample(row)
    assert (nothing.logprob, nothing.top_logprobs) == (None, ())
    own = sampler(3, temperature=0, logprobs=0).sample(row)
    assert own.top_logprobs == ()
    assert own.logprob == pytest.approx(-math.log(2), rel=1e-15)  # one rounding
    many = sampler(3, temperature=0, logprobs=20).sample(row)
    assert [token for token, _ in many.top_logprobs] == [0, 1]  # the banned token is left out


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("edits", [{}, {"logit_bias": {0: 1.0}}])
def test_nan_and_infinite_logits_are_an_error_that_names_the_token(
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
def test_sampling_allocates_nothing_of_the_vocabularys_size(options: dict[str, Any]) -> None:
    row = row_of("peaked", 49_152, seed=0).copy()  # writable: argmax copies a read-only row
    ours = sampler(row.size, seed=0, **options)
    ours.sample(row)
    tracemalloc.start()
    ours.sample(row)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A copy of the row is 196,608 bytes, a mask 49,152. The top-p candidates of such a row are
    # about a hundred tokens, each with an id and a few float64: 40 KiB suffices for them.
    assert peak < 40 * 1024


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 1000])
def test_a_draw_is_the_first_index_with_a_larger_cumulative_weight(size: int) -> None:
    weights = np.random.default_rng(size).integers(0, 3, size).astype(np.float64)
    weights[size // 2] = 1.0
    edges = weights.cumsum()  # small integers: exact in any order
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
    ("options", "context"), [({"logit_bias": {10: 1.0}}, ()), ({}, (3, 10)), ({}, (-1,))]
)
def test_an_unknown_token_is_refused(options: dict[str, Any], context: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="this model's tokens are 0 to 9"):
        sampler(10, context, **options)


@pytest.mark.parametrize(
    "row", [np.zeros(9, np.float32), np.zeros((1, 10), np.float32), np.zeros(10, np.float16)]
)
def test_only_one_float32_row_is_accepted(row: Row) -> None:
    with pytest.raises(ValueError, match=r"one row of float32 \[10\] is expected"):
        sampler(10).sample(row)
