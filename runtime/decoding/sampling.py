"""Sample one token id from one row of logits. Knows nothing about models, text or batches.

The order of operations is the usual one. What each step equals in Hugging Face transformers:

    logit bias             SequenceBiasLogitsProcessor on single tokens: added
    repetition penalty     RepetitionPenaltyLogitsProcessor (CTRL, arXiv:1909.05858)
    presence, frequency    no counterpart; OpenAI's definition, over generated tokens only
    temperature, top-k, top-p, min-p    see `truncation.py`

Scores are float32, as the backend returns them; what is exponentiated, summed and drawn is
float64. A token takes one PCG64 output and one search in the cumulative distribution over
ascending ids, so a seed gives the same tokens wherever the logits are the same. (Platforms may
differ in the last bit of `exp`, which matters only if a draw falls within 1e-15 of an edge.)
"""

import math
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphs.errors import MistralcError, UsageError
from runtime.decoding.truncation import Truncation

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ids = NDArray[np.int64]

BLOCK = 256  # weights summed at once in a draw: 32,768 take 12 us, and 108 us in one cumsum

# Field, minimum, maximum, meaning. The bounds are wide: they only keep scores from overflowing.
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
    ("seed", "omit it to draw one"),
    ("logprobs", "omit it for none"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose a token. The defaults sample the model's own distribution.

    `logit_bias` is added to the logits by token id: -100 bans a token in practice, -inf entirely.
    `logprobs` None returns no log-probabilities, n those of the chosen token and of the n most
    likely ones. `seed` None draws a seed, which is then in `Sampler.seed`.
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
        for name, minimum, maximum, meaning in RANGES:
            value = getattr(self, name)
            if not _is_number(value) or not minimum <= value <= maximum:
                limits = f"from {minimum:g} to {maximum:g}"
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
        # A copy, because the caller may change theirs.
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A token and, if `SamplingParams.logprobs` is set, natural log-probabilities.

    They describe the distribution after logit bias and penalties, at temperature 1 and before any
    truncation, so they do not depend on the random stream. `top_logprobs` holds (token id,
    log-probability), most likely first, ties by ascending id. Banned tokens are left out, and the
    chosen token is only there if it is among the most likely ones.
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one sequence: its random stream, its token counts and its buffers.

    `context` holds the prompt's ids, which only the repetition penalty uses. The caller's rows are
    never written to, and no call allocates an array as long as the vocabulary, unless the row is so
    flat that much of it passes the truncations. (Rows should still be writable, because NumPy's
    argmax copies read-only arrays.)

    For speculative decoding `sample` is enough: sample the draft's positions in order and stop at
    the first token that differs from the draft. Each token is drawn from the exact distribution
    with one uniform number, so a seed gives the same text with and without drafts. `distribution`
    and `observe` are its two halves, for methods that accept or force tokens themselves.
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
        self._truncation = Truncation(
            vocab_size, temperature=params.temperature, top_k=params.top_k,
            top_p=params.top_p, min_p=params.min_p,
        )  # fmt: skip
        self._counts: Counter[int] = Counter()  # of generated tokens
        self._tally = np.zeros(vocab_size if self._counts_matter else 0, dtype=np.float32)
        self._seen: set[int] = set()  # prompt and generated tokens; below the same as an array
        self._seen_ids = np.empty(vocab_size if self._edits else 0, dtype=np.int64)
        for token_id in context:
            self._see(int(token_id))

    def sample(self, logits: Floats) -> Sampled:
        """Choose a token from one row of logits, [V] float32, and `observe` it.

        Temperature 0 takes the highest score, and the lowest id on ties. Raises MistralcError if
        the row holds NaN or infinity, or if every token is banned.
        """
        scores = self._edited(logits)
        best, top = _best(scores)
        if self.params.temperature == 0:
            token_id = best
        else:
            ids, weights = self._truncation.kept(scores, top)
            token_id = int(ids[_draw(weights, self._uniform())])
        self.observe(token_id)
        if self.params.logprobs is None:
            return Sampled(token_id=token_id)
        return self._report(scores, top, token_id, self.params.logprobs)

    def distribution(self, logits: Floats) -> tuple[Ids, Doubles]:
        """The tokens that `sample` would draw from, ascending, and their probabilities.

        Ids that are not listed have probability 0. Nothing is drawn or counted. The arrays may be
        this sampler's buffers: do not write to them, and use them before its next call.
        """
        scores = self._edited(logits)
        best, top = _best(scores)
        if self.params.temperature == 0:
            return np.array([best], dtype=np.int64), np.ones(1)
        ids, weights = self._truncation.kept(scores, top)
        weights /= weights.sum()
        return ids, weights

    def observe(self, token_id: int) -> None:
        """Count a generated token for the penalties; `sample` does so for its own tokens."""
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
        """The next number in [0, 1), from raw bits, whose stream is the same in every NumPy."""
        return float((self._bits.random_raw() >> 11) * 2.0**-53)

    def _edited(self, logits: Floats) -> Floats:
        """The row after logit bias and penalties; the caller's own array if there are none."""
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

    def _report(self, scores: Floats, top: float, token_id: int, count: int) -> Sampled:
        """The chosen token and the `count` most likely ones, with their log-probabilities."""
        norm = self._truncation.log_normalizer(scores, top)
        ids = self._truncation.largest(scores, count) if count else np.empty(0, np.int64)
        most_likely = ids[np.argsort(-scores[ids], kind="stable")][:count]
        return Sampled(
            token_id=token_id,
            logprob=float(scores[token_id]) - norm,
            top_logprobs=tuple((int(i), float(scores[i]) - norm) for i in most_likely),
        )


def _best(scores: Floats) -> tuple[int, float]:
    """The lowest id with the highest score, and that score; NaN counts as highest in NumPy."""
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
        "type may overflow, or the bundle is damaged: `mistralc verify` shows which."
    )


def _draw(weights: Doubles, uniform: float) -> int:
    """The first index whose cumulative weight exceeds `uniform` times the total.

    It is searched over blocks and then within one. `uniform` is at most 1 - 2^-53, so its rounded
    product with the total is below the total, and a block with nonzero weight is always found.
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
