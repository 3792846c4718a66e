"""The sampling distribution equals that of transformers and of the definition."""

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

from runtime.decoding.sampling import Sampler, SamplingParams
from tests.runtime.decoding.sampling_rows import DOUBLE, Row, dense, row_of, sampler


def theirs(row: Row, processors: list[LogitsProcessor]) -> NDArray[np.float64]:
    """Probabilities by transformers in float64, so rounding is not what differs."""
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
    ids=lambda value: (
        str(value) if isinstance(value, dict) else ""
    ),  # the repr of a processor is its address
)
def test_truncations_equal_those_of_transformers_including_ties(
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
def test_top_p_equals_that_of_transformers_except_for_the_choice_among_ties(
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
    """Temperature, top-k, top-p and min-p by their definitions, with one full sort."""
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
def test_the_distribution_equals_that_of_a_full_sort(
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
    # Relative as above; below 1e-300 float64 loses digits.
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
