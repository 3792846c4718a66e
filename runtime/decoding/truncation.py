"""Which tokens may be sampled and with which weights: temperature, top-k, top-p, min-p.

Knows one row of scores; nothing about penalties, random numbers or text. What each step equals in
Hugging Face transformers:

    temperature   TemperatureLogitsWarper
    top-k         TopKLogitsWarper: tokens that tie with the k-th are kept too
    top-p         TopPLogitsWarper: the fewest tokens that reach p (arXiv:1904.09751)
    min-p         MinPLogitsWarper: at least min_p times the most likely one (arXiv:2407.01082)

At the edge of top-p, tied tokens are kept in order of ascending id (transformers leaves their order
to its sort). Scores are float32; what is exponentiated and summed is float64.
"""

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ids = NDArray[np.int64]

LOWEST = float(np.finfo(np.float32).min)  # the smallest score that is not banned
COLUMNS = 512  # of the matrix whose columns' maxima bound the k-th largest score
SHARE = 2**-10  # at most 1,024 tokens have this probability, so there is little to sort
BINS = 4096  # of a nucleus' scores: of 49,152 normal logits at most 76 are in one bin


class Truncation:
    """Top-k, top-p and min-p for one sequence, with buffers as long as the vocabulary.

    0 turns top-k and min-p off, 1 turns top-p off. Arrays that a method returns may be buffers:
    they are valid until the next call. Rows are never written to.
    """

    def __init__(
        self, vocab_size: int, *, temperature: float, top_k: int, top_p: float, min_p: float
    ) -> None:
        self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p
        self._weights = np.empty(vocab_size, dtype=np.float64)
        self._mask = np.empty(vocab_size, dtype=np.bool_)
        self._ids = _all_ids(vocab_size)

    def kept(self, scores: Floats, top: float) -> tuple[Ids, Doubles]:
        """Apply top-k, top-p and min-p to one row of scores, [V] float32, whose maximum is `top`.

        Returns the ids that remain, ascending, and exp((score - top) / temperature) of each.
        """
        temperature = self.temperature
        if self.top_k:
            ids = self.largest(scores, self.top_k)
            weights = _exponential(scores[ids].astype(np.float64), top, temperature)
            if self.top_p < 1:
                ids, weights = _nucleus(ids, weights, self.top_p * weights.sum())
        elif self.top_p < 1:
            ids, weights = self._nucleus_of_row(scores, top)
        elif self.min_p > 0:
            floor = top + temperature * math.log(self.min_p)
            floor -= 1e-6 * (1 + abs(floor))  # float32 rounds by 6e-8; the exact cut is below
            ids = self._at_least(scores, max(floor, LOWEST))
            weights = _exponential(scores[ids].astype(np.float64), top, temperature)
        else:
            np.copyto(self._weights, scores)
            return self._ids, _exponential(self._weights, top, temperature)
        if self.min_p > 0:
            kept = weights >= self.min_p  # the most likely token has weight 1
            ids, weights = ids[kept], weights[kept]
        return ids, weights

    def largest(self, scores: Floats, k: int) -> Ids:
        """Ascending ids of the k largest scores and of those that tie with the k-th, none banned.

        The row is viewed as a matrix of at least 4 k columns. At least k scores reach the k-th
        largest of the columns' maxima, so that is a lower bound of the k-th largest score, and few
        more than k scores reach it: 25 us at V=32,768, where argpartition takes 235.
        """
        columns, bound = max(COLUMNS, 4 * k), LOWEST
        if scores.size >= 2 * columns:
            whole = scores.size - scores.size % columns
            bound = _kth(scores[:whole].reshape(-1, columns).max(axis=0), k)
        ids = self._at_least(scores, max(bound, LOWEST))
        if ids.size > k:
            found = scores[ids]
            ids = ids[found >= _kth(found, k)]
        return ids

    def log_normalizer(self, scores: Floats, top: float) -> float:
        """log(sum(exp(scores))) of one row, whose maximum is `top`, at temperature 1."""
        np.copyto(self._weights, scores)
        return top + math.log(_exponential(self._weights, top, 1.0).sum())

    def _at_least(self, values: NDArray[Any], bound: float) -> Ids:
        """Ascending indices of the values that are at least `bound`."""
        np.greater_equal(values, bound, out=self._mask)
        return self._mask.nonzero()[0]

    def _nucleus_of_row(self, scores: Floats, top: float) -> tuple[Ids, Doubles]:
        """The top-p nucleus of all V tokens; sorts only tokens that may be near its edge.

        On ordinary rows, the few tokens with a probability of at least `SHARE` reach p. On flat
        rows, a histogram over the scores finds the bin that holds the edge. It reaches down to a
        weight of (1 - p) / 2V: all tokens below (1 - p) / V together have less than 1 - p, so
        none of them is in the nucleus.
        """
        np.copyto(self._weights, scores)
        weights = _exponential(self._weights, top, self.temperature)
        total, top_p = float(weights.sum()), self.top_p
        ids = self._at_least(weights, SHARE * total)
        heavy = weights[ids]
        if ids.size and heavy.sum() >= top_p * total:
            return _nucleus(ids, heavy, top_p * total)
        span = self.temperature * math.log(2 * scores.size / (1 - top_p))
        with np.errstate(over="ignore"):  # a tiny temperature: all others get the last bin
            bins = np.minimum((top - scores) * min(BINS / span, 1e30), BINS - 1).astype(np.int64)
        mass = np.bincount(bins, weights).cumsum()
        edge = int(mass.searchsorted(top_p * mass[-1]))
        near = (bins == edge).nonzero()[0]
        rest = top_p * mass[-1] - (mass[edge - 1] if edge else 0.0)
        last, _ = _nucleus(near, weights[near], rest)
        ids = np.sort(np.concatenate(((bins < edge).nonzero()[0], last)), kind="stable")
        return ids, weights[ids]


@lru_cache(maxsize=4)
def _all_ids(vocab_size: int) -> Ids:
    """The ids 0 to V - 1: one read-only array for all sequences."""
    ids = np.arange(vocab_size, dtype=np.int64)
    ids.flags.writeable = False
    return ids


def _exponential(scores: Doubles, top: float, temperature: float) -> Doubles:
    """exp((scores - top) / temperature), in place; the largest score, `top`, becomes 1."""
    scores -= top
    if temperature != 1:
        with np.errstate(over="ignore"):  # a tiny temperature: -inf, which gives weight 0
            scores *= min(1 / temperature, 1e300)  # twice as fast as dividing
    return np.exp(scores, out=scores)


def _kth(values: Floats, k: int) -> float:
    """The k-th largest of a few values."""
    return float(np.partition(values, values.size - k)[values.size - k])


def _nucleus(ids: Ids, weights: Doubles, mass: float) -> tuple[Ids, Doubles]:
    """The fewest tokens, heaviest first, whose weights reach `mass`; ties by ascending id."""
    ordered = np.sort(weights)[::-1]
    count = min(int(ordered.cumsum().searchsorted(mass)) + 1, ordered.size)
    least = ordered[count - 1]
    kept = weights >= least
    surplus = int(np.count_nonzero(kept)) - count
    if surplus:
        kept[np.flatnonzero(weights == least)[-surplus:]] = False
    return ids[kept], weights[kept]
