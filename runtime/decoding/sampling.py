"""Turns one row of logits into one token id. Knows nothing about models, text or batches.

The order of operations is the field's. What each step equals in Hugging Face transformers:

    logit bias             SequenceBiasLogitsProcessor on single tokens: added
    repetition penalty     RepetitionPenaltyLogitsProcessor (CTRL, arXiv:1909.05858)
    presence, frequency    no counterpart; OpenAI's definition, over generated tokens only
    temperature            TemperatureLogitsWarper
    top-k                  TopKLogitsWarper: what ties with the k-th is kept too
    top-p                  TopPLogitsWarper: the fewest tokens that reach p (arXiv:1904.09751)
    min-p                  MinPLogitsWarper: at least min_p times the likeliest (arXiv:2407.01082)

At the edge of top-p, tied tokens enter by ascending id (the warper leaves it to its sort).

Scores are float32, as the backend gives them; what is exponentiated, summed and drawn is
float64. A token costs one PCG64 output and one search in the cumulative distribution over
ascending ids, so a seed gives the same tokens wherever the logits are the same. (Platforms may
differ in the last bit of `exp`; a draw would have to fall within 1e-15 of an edge to notice.)
"""

import math
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphs.errors import MistralcError, UsageError

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ids = NDArray[np.int64]

LOWEST = float(np.finfo(np.float32).min)  # the least score that is not banned
BLOCK = 256  # weights summed at once in a draw: 32,768 take 12 us so, 108 us in one cumsum
COLUMNS = 512  # maxima from which the k-th largest score is bounded below
SHARE = 2**-10  # no more than 1,024 tokens have this probability: little to sort
BINS = 4096  # of scores a nucleus may reach: of 49,152 normal logits at most 76 share one

# Field, least, most, meaning. The bounds are far out: they only keep scores from overflowing.
RANGES = (
    ("temperature", 0.0, 1000.0, "0 is greedy, 1 leaves the distribution as it is"),
    ("top_p", 0.0, 1.0, "1 is off"),
    ("min_p", 0.0, 1.0, "0 is off"),
    ("repetition_penalty", 0.01, 100.0, "1 is off, 1.1 is mild"),
    ("presence_penalty", -100.0, 100.0, "0 is off; OpenAI's range is -2 to 2"),
    ("frequency_penalty", -100.0, 100.0, "0 is off; OpenAI's range is -2 to 2"),
)
COUNTS = (
    ("top_k", "0 is off"),
    ("seed", "leave it out to have one drawn"),
    ("logprobs", "leave it out for none"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose a token. The defaults sample the model's own distribution.

    `logit_bias` adds to logits by token id: -100 bans a token in practice, -inf for certain.
    `logprobs` asks for log-probabilities: None for none, n for the chosen token's and the n
    likeliest. `seed` None draws one; `Sampler.seed` tells which.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, least, most, meaning in RANGES:
            value = getattr(self, name)
            if not _is_number(value) or not least <= value <= most:
                limits = f"from {least:g} to {most:g}"
                raise UsageError(f"{name} is {value!r}; a number {limits} is expected ({meaning}).")
        for name, meaning in COUNTS:
            value = getattr(self, name)
            if not _is_count(value) and (value is not None or name == "top_k"):
                raise UsageError(
                    f"{name} is {value!r}; a whole number from 0 up is expected ({meaning})."
                )
        for token_id, bias in self.logit_bias.items():
            if not _is_count(token_id) or not _is_number(bias) or not bias <= 1e4:
                raise UsageError(
                    f"logit_bias maps {token_id!r} to {bias!r}; a token id and a number up to "
                    "10000 are expected (-100 bans a token, 100 all but forces it)."
                )
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))  # the caller keeps theirs


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A token and, where `SamplingParams.logprobs` asked, natural-log probabilities.

    They describe the distribution after logit bias and penalties, at temperature 1, before any
    truncation: what the model says under the edits the caller asked for, whatever the dice.
    `top_logprobs` holds (token id, log-probability), likeliest first, ties by ascending id;
    banned tokens are left out, and the chosen token is not in it unless it is among the likeliest.
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Sampler:
    """The choice of one sequence's tokens: its random stream, its counts and its buffers.

    `context` holds the prompt's ids, which only the repetition penalty looks at. The caller's
    rows are never written to, and no call allocates what is as long as the vocabulary, unless
    the row is so flat that a good part of it passes. (Rows should be writable all the same:
    NumPy's argmax copies what is not.)

    Speculation needs no more than `sample`: score the draft's positions in order and stop at the
    first token that differs from the draft. Each token is drawn from the exact distribution with
    one uniform number, so with and without drafts a seed gives the same text. `distribution`
    and `observe` are the two halves for schemes that accept or force tokens themselves.
    """

    def __init__(
        self, params: SamplingParams, vocab_size: int, context: Iterable[int] = ()
    ) -> None:
        self.params = params
        self.seed = secrets.randbits(32) if params.seed is None else int(params.seed)
        self._bits = np.random.PCG64(self.seed)
        self._vocab_size = vocab_size
        for token_id in params.logit_bias:
            self._check(token_id)
        self._bias_ids = np.array(list(params.logit_bias), dtype=np.int64)
        self._bias = np.array(list(params.logit_bias.values()), dtype=np.float32)
        self._counts_matter = bool(params.presence_penalty or params.frequency_penalty)
        self._edits = (
            bool(params.logit_bias) or self._counts_matter or params.repetition_penalty != 1
        )
        self._scores = np.empty(vocab_size if self._edits else 0, dtype=np.float32)
        self._weights = np.empty(vocab_size, dtype=np.float64)
        self._mask = np.empty(vocab_size, dtype=np.bool_)
        self._ids = _all_ids(vocab_size)
        self._counts: Counter[int] = Counter()  # of generated tokens
        self._tally = np.zeros(vocab_size if self._counts_matter else 0, dtype=np.float32)
        self._seen: set[int] = set()  # prompt and generated tokens, and the same as an array
        self._seen_ids = np.empty(vocab_size if self._edits else 0, dtype=np.int64)
        for token_id in context:
            self._see(int(token_id))

    def sample(self, logits: Floats) -> Sampled:
        """Choose a token from one row of logits, [V] float32, and `observe` it.

        Temperature 0 takes the highest score, the lowest id on ties. Raises MistralcError when
        the row holds NaN or infinity, or when every token is banned.
        """
        scores = self._edited(logits)
        best, top = _best(scores)
        if self.params.temperature == 0:
            token_id = best
        else:
            ids, weights = self._kept(scores, top)
            token_id = int(ids[_draw(weights, self._uniform())])
        self.observe(token_id)
        if self.params.logprobs is None:
            return Sampled(token_id=token_id)
        return self._report(scores, top, token_id, self.params.logprobs)

    def distribution(self, logits: Floats) -> tuple[Ids, Doubles]:
        """The tokens that `sample` would draw from, ascending, and their probabilities.

        An id that is not listed has probability 0. Nothing is drawn or counted. The arrays may
        be this sampler's buffers: read-only, and good until its next call.
        """
        scores = self._edited(logits)
        best, top = _best(scores)
        if self.params.temperature == 0:
            return np.array([best], dtype=np.int64), np.ones(1)
        ids, weights = self._kept(scores, top)
        weights /= weights.sum()
        return ids, weights

    def observe(self, token_id: int) -> None:
        """Count a generated token for the penalties. `sample` does it for its own."""
        if not self._edits:
            return
        self._see(token_id)
        if self._counts_matter:
            self._counts[token_id] += 1
            per_use = self.params.frequency_penalty * self._counts[token_id]
            self._tally[token_id] = self.params.presence_penalty + per_use

    def _see(self, token_id: int) -> None:
        if token_id not in self._seen:
            self._check(token_id)
            if self._edits:
                self._seen_ids[len(self._seen)] = token_id
            self._seen.add(token_id)

    def _check(self, token_id: int) -> None:
        if not 0 <= token_id < self._vocab_size:
            raise UsageError(
                f"Token {token_id} is in the prompt, the logit bias or the text; this model's "
                f"tokens are 0 to {self._vocab_size - 1}. Take ids from the bundle's tokenizer."
            )

    def _uniform(self) -> float:
        """The next number in [0, 1). From raw bits: their stream never changes between NumPys."""
        return float((self._bits.random_raw() >> 11) * 2.0**-53)

    def _edited(self, logits: Floats) -> Floats:
        """The row after logit bias and penalties: the caller's own where there are none."""
        if logits.shape != (self._vocab_size,) or logits.dtype != np.float32:
            raise ValueError(
                f"logits are {logits.dtype} {list(logits.shape)}; one row of float32 "
                f"[{self._vocab_size}] is expected. Cast it, or index the batch."
            )
        if not self._edits:
            return logits
        scores, penalty = self._scores, self.params.repetition_penalty
        np.copyto(scores, logits)
        if self._bias_ids.size:
            scores[self._bias_ids] += self._bias
        if penalty != 1:
            ids = self._seen_ids[: len(self._seen)]
            seen = scores[ids]
            scores[ids] = np.where(seen < 0, seen * penalty, seen / penalty)
        if self._counts_matter:
            scores -= self._tally
        return scores

    def _kept(self, scores: Floats, top: float) -> tuple[Ids, Doubles]:
        """The ids that pass the truncations, ascending, and exp((score - top) / temperature)."""
        params, temperature = self.params, self.params.temperature
        if params.top_k:
            ids = self._largest(scores, params.top_k)
            weights = _exponential(scores[ids].astype(np.float64), top, temperature)
            if params.top_p < 1:
                ids, weights = _nucleus(ids, weights, params.top_p * weights.sum())
        elif params.top_p < 1:
            ids, weights = self._nucleus_of_row(scores, top)
        elif params.min_p > 0:
            floor = top + temperature * math.log(params.min_p)
            floor -= 1e-6 * (1 + abs(floor))  # float32 rounds by 6e-8; the exact cut comes below
            ids = self._at_least(scores, max(floor, LOWEST))
            weights = _exponential(scores[ids].astype(np.float64), top, temperature)
        else:
            np.copyto(self._weights, scores)
            return self._ids, _exponential(self._weights, top, temperature)
        if params.min_p > 0:
            kept = weights >= params.min_p  # the likeliest weighs 1
            ids, weights = ids[kept], weights[kept]
        return ids, weights

    def _at_least(self, values: NDArray[Any], bound: float) -> Ids:
        """Ascending indices of the values that are not below `bound`."""
        np.greater_equal(values, bound, out=self._mask)
        return self._mask.nonzero()[0]

    def _largest(self, scores: Floats, k: int) -> Ids:
        """Ids of the k largest scores and of what ties with the last of them; none is banned.

        The row is read as a matrix of at least 4 k columns. The k-th largest of the columns'
        maxima is a score that k scores reach, so it bounds the k-th largest score from below,
        and hardly more than k scores reach it: 25 us at V=32,768, where argpartition takes 235.
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

    def _nucleus_of_row(self, scores: Floats, top: float) -> tuple[Ids, Doubles]:
        """The top-p nucleus of all V tokens, sorting only what may lie near its edge.

        On ordinary rows the few tokens of probability `SHARE` and more hold p. On flat rows a
        histogram over the score finds the bin that holds the edge. It reaches down to half of
        (1 - p) / V: tokens below (1 - p) / V weigh less than 1 - p together, so none is needed.
        """
        np.copyto(self._weights, scores)
        weights = _exponential(self._weights, top, self.params.temperature)
        total, top_p = float(weights.sum()), self.params.top_p
        ids = self._at_least(weights, SHARE * total)
        heavy = weights[ids]
        if ids.size and heavy.sum() >= top_p * total:
            return _nucleus(ids, heavy, top_p * total)
        span = self.params.temperature * math.log(2 * scores.size / (1 - top_p))
        with np.errstate(over="ignore"):  # a tiny temperature: all but the likeliest are last
            bins = np.minimum((top - scores) * min(BINS / span, 1e30), BINS - 1).astype(np.int64)
        mass = np.bincount(bins, weights).cumsum()
        edge = int(mass.searchsorted(top_p * mass[-1]))
        near = (bins == edge).nonzero()[0]
        rest = top_p * mass[-1] - (mass[edge - 1] if edge else 0.0)
        last, _ = _nucleus(near, weights[near], rest)
        ids = np.sort(np.concatenate(((bins < edge).nonzero()[0], last)), kind="stable")
        return ids, weights[ids]

    def _report(self, scores: Floats, top: float, token_id: int, count: int) -> Sampled:
        """The chosen token with its log-probability and the `count` likeliest with theirs."""
        np.copyto(self._weights, scores)
        norm = top + math.log(_exponential(self._weights, top, 1.0).sum())
        ids = self._largest(scores, count) if count else self._ids[:0]
        likeliest = ids[np.argsort(-scores[ids], kind="stable")][:count]
        return Sampled(
            token_id=token_id,
            logprob=float(scores[token_id]) - norm,
            top_logprobs=tuple((int(i), float(scores[i]) - norm) for i in likeliest),
        )


@lru_cache(maxsize=4)
def _all_ids(vocab_size: int) -> Ids:
    """0 to V - 1, one array for all sequences."""
    ids = np.arange(vocab_size, dtype=np.int64)
    ids.flags.writeable = False
    return ids


def _best(scores: Floats) -> tuple[int, float]:
    """The lowest id of the highest score, and that score. NaN counts as highest in NumPy."""
    best = int(scores.argmax())
    top = float(scores[best])
    if math.isfinite(top):
        return best, top
    if top == -math.inf:
        raise MistralcError(
            "Every token is banned: all scores are -inf after logit bias; at least one token "
            "must stay possible. Take some of the bans back."
        )
    raise MistralcError(
        f"The model's logit for token {best} is {top}; finite numbers are expected. The activation "
        "type may overflow, or the bundle is damaged: `mistralc verify` tells which."
    )


def _exponential(scores: Doubles, top: float, temperature: float) -> Doubles:
    """exp((scores - top) / temperature), in place. The highest score, `top`, becomes 1."""
    scores -= top
    if temperature != 1:
        with np.errstate(over="ignore"):  # a tiny temperature: -inf, and so weight 0, is right
            scores *= min(1 / temperature, 1e300)  # twice as fast as dividing
    return np.exp(scores, out=scores)


def _kth(values: Floats, k: int) -> float:
    """The k-th largest of a few values."""
    return float(np.partition(values, values.size - k)[values.size - k])


def _nucleus(ids: Ids, weights: Doubles, mass: float) -> tuple[Ids, Doubles]:
    """The fewest of the heaviest tokens whose weights reach `mass`; ties by ascending id."""
    ordered = np.sort(weights)[::-1]
    count = min(int(ordered.cumsum().searchsorted(mass)) + 1, ordered.size)
    least = ordered[count - 1]
    kept = weights >= least
    surplus = int(np.count_nonzero(kept)) - count
    if surplus:
        kept[np.flatnonzero(weights == least)[-surplus:]] = False
    return ids[kept], weights[kept]


def _draw(weights: Doubles, uniform: float) -> int:
    """The first index whose cumulative weight exceeds `uniform` times the total.

    In two steps, over blocks and within one. `uniform` is at most 1 - 2^-53, and rounding takes
    its product with the total below the total, so a block is always found, and one with weight.
    """
    edges = np.add.reduceat(weights, np.arange(0, weights.size, BLOCK)).cumsum()
    target = uniform * float(edges[-1])
    block = int(edges.searchsorted(target, side="right"))
    before = float(edges[block - 1]) if block else 0.0
    inside = weights[block * BLOCK : (block + 1) * BLOCK]
    index = int(inside.cumsum().searchsorted(target - before, side="right"))
    if index == inside.size:  # the block's sum and its cumsum round differently
        index = int(np.flatnonzero(inside)[-1])
    return block * BLOCK + index


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real)


def _is_count(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= 0
