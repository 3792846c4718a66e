"""Rows of logits and samplers for tests. Asserts that distributions are well-formed."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.decoding.sampling import Sampler, SamplingParams

Row = NDArray[np.float32]

# Relative tolerance. Our weights and the reference's are float64 and round differently: two parts
# in 2^53 of a scaled score are at most 2e-13 of its exponential, which is 0 below a score of -745.
DOUBLE = 1e-12


def row_of(kind: str, size: int, seed: int) -> Row:
    random = np.random.default_rng(seed)
    if kind == "peaked":
        logits = random.permutation(-1.5 * np.log(np.arange(1, size + 1)))
    elif kind == "tied":
        logits = (
            np.round(random.normal(size=size) * 4) / 2
        )  # about twenty distinct values, so many ties
    else:
        logits = random.normal(size=size) * 3
    row = logits.astype(np.float32)
    row.flags.writeable = False  # writing to the caller's row would raise
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
