"""Prompt lookup: drafts for speculative decoding from the text itself. Knows no model or backend.

If the last few tokens occurred before, the tokens that followed them then are the draft. The model
verifies a whole draft in one step, which costs little more than a step for one token, because both
read all weights once. If a share p of the guesses is accepted, the n-th token of a draft is used
with probability p^n. A draft is as long as p^n exceeds the cost of one more token. Drafts pause
while not even one token is worth its cost, so text without repetition is not slowed down.
"""

from array import array
from dataclasses import dataclass, field
from math import log

import numpy as np
from numpy.typing import NDArray

NGRAM = 3  # tokens that must have occurred together before
COST = 0.2  # of one more token, in steps: 0.06 in int8 and up to 0.28 in int4wo were measured
FIRST_SHARE = 0.6  # the share of accepted guesses that is assumed at first
MIN_SHARE, MAX_SHARE = 0.01, 0.999
NEWEST_WEIGHT = 0.15  # of the newest guess in the share's moving average
PROBE_TOKENS = 2  # length of a draft that tests whether guesses are accepted again
LONGEST_PAUSE = 64  # tokens between such drafts


@dataclass(slots=True)
class Draft:
    """Guessed tokens that one step has verified; the first `accepted` were sampled so far.

    Row i of `logits` [n + 1, V] follows the first i of the n `ids`.
    """

    ids: list[int] = field(default_factory=list)
    logits: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))
    accepted: int = 0

    def confirms(self, token: int) -> bool:
        """Accept the next guess if it is `token`; returns whether it is."""
        found = self.accepted < len(self.ids) and self.ids[self.accepted] == token
        self.accepted += found
        return found


class PromptLookup:
    """Drafts of at most `longest` tokens for one sequence, whose tokens so far are `tokens`.

    `tokens` is the caller's own array. It may grow between calls but must not shrink.
    """

    def __init__(self, tokens: "array[int]", longest: int) -> None:
        self._tokens, self._longest = tokens, longest
        self._after: dict[tuple[int, ...], int] = {}  # by NGRAM tokens: index of what last followed
        self._indexed = 0  # number of tokens that are in `_after` as followers
        self._share, self._pause, self._waited = FIRST_SHARE, 1, 0

    def draft(self, token: int, room: int) -> list[int]:
        """Guess at most `room` tokens after `token`, which itself follows all `tokens`."""
        self._index()
        self._waited += 1
        if self._waited < self._pause:
            return []
        start = self._after.get((*self._tokens[1 - NGRAM :], token))
        if start is None:
            return []
        length = min(self._worthwhile() or PROBE_TOKENS, self._longest, room)
        # In a text that repeats a few tokens, what followed may reach into the draft itself.
        known = [*self._tokens[start : start + length], token]
        draft = known[: min(length, len(self._tokens) - start + 1)]
        period = len(draft)
        while draft and len(draft) < length:
            draft.append(draft[-period])
        return draft

    def learn(self, drafted: int, accepted: int) -> None:
        """Update the share of accepted guesses: the first `accepted` of `drafted` tokens were."""
        # Guesses after the first rejected one say nothing.
        for guess in (True,) * accepted + (False,) * (accepted < drafted):
            share = self._share + NEWEST_WEIGHT * (guess - self._share)
            self._share = min(max(share, MIN_SHARE), MAX_SHARE)
        self._pause = 1 if self._worthwhile() else min(2 * self._pause, LONGEST_PAUSE)
        self._waited = 0

    def _worthwhile(self) -> int:
        """The longest draft whose last token is worth its cost: p^n > COST."""
        return int(log(COST) / log(self._share))

    def _index(self) -> None:
        """Record what followed every NGRAM tokens; a later occurrence replaces an earlier one."""
        first = max(self._indexed, NGRAM)
        before = (self._tokens[first - NGRAM + i :] for i in range(NGRAM))
        followers = range(first, len(self._tokens))
        self._after.update(zip(zip(*before, strict=False), followers, strict=False))
        self._indexed = len(self._tokens)
