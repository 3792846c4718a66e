"""Drafts for speculative decoding, looked up in the text itself. Knows no model and no backend.

Prompt lookup: where the last few tokens stood before, what followed them then may follow now. The
model verifies a whole draft in one step, which costs little more than a step for one token, since
both read all weights once. With a share p of guesses right, the n-th token of a draft comes to use
with p^n, so drafts are as long as that is worth the token's cost, and pause while not even one is:
text without repetition runs as if there were none.
"""

from array import array
from dataclasses import dataclass, field
from math import log

import numpy as np
from numpy.typing import NDArray

SIZE = 3  # tokens that must have stood together before
COST = 0.2  # of a step, for one token more in it: 0.06 in int8 and up to 0.28 in int4wo were seen
LIKELY = 0.6  # the share of right guesses that is assumed at first, and its bounds
LEAST, MOST = 0.01, 0.999
NEWEST = 0.15  # weight of the newest guess in that share
PROBE = 2  # tokens of a draft that finds out whether guesses are right again
LONGEST_PAUSE = 64  # tokens between such drafts


@dataclass(slots=True)
class Draft:
    """Guessed tokens that a step has looked at, of which the first `right` have come so far.

    Of `logits` [n + 1, V], row i is what follows the first i of the n `ids`.
    """

    ids: list[int] = field(default_factory=list)
    logits: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))
    right: int = 0

    def confirms(self, token: int) -> bool:
        """Whether `token` is the next guess; then that one is right."""
        found = self.right < len(self.ids) and self.ids[self.right] == token
        self.right += found
        return found


class PromptLookup:
    """Drafts of at most `longest` tokens for one sequence, whose tokens so far are `tokens`.

    `tokens` is the caller's own array and may grow between calls; it may not be cut.
    """

    def __init__(self, tokens: "array[int]", longest: int) -> None:
        self._tokens, self._longest = tokens, longest
        self._after: dict[tuple[int, ...], int] = {}  # SIZE tokens: index of what followed last
        self._indexed = 0  # how many of the tokens have been something's followers
        self._likely, self._pause, self._waited = LIKELY, 1, 0

    def draft(self, token: int, room: int) -> list[int]:
        """Guess at most `room` tokens after `token`, which comes after all `tokens`."""
        self._index()
        self._waited += 1
        if self._waited < self._pause:
            return []
        start = self._after.get((*self._tokens[1 - SIZE :], token))
        if start is None:
            return []
        length = min(self._worth() or PROBE, self._longest, room)
        # What follows may run into the draft itself, where a text repeats a few tokens.
        known = [*self._tokens[start : start + length], token]
        draft = known[: min(length, len(self._tokens) - start + 1)]
        period = len(draft)
        while draft and len(draft) < length:
            draft.append(draft[-period])
        return draft

    def learn(self, drafted: int, right: int) -> None:
        """Take note that the first `right` of `drafted` tokens were those that came."""
        for guess in (True,) * right + (False,) * (right < drafted):  # after one, none counts
            likely = self._likely + NEWEST * (guess - self._likely)
            self._likely = min(max(likely, LEAST), MOST)
        self._pause = 1 if self._worth() else min(2 * self._pause, LONGEST_PAUSE)
        self._waited = 0

    def _worth(self) -> int:
        """How long a draft may be for its last token to be worth its cost: p^n > COST."""
        return int(log(COST) / log(self._likely))

    def _index(self) -> None:
        """Note what followed every SIZE tokens; a later place replaces an earlier one."""
        first = max(self._indexed, SIZE)
        before = (self._tokens[first - SIZE + i :] for i in range(SIZE))
        followers = range(first, len(self._tokens))
        self._after.update(zip(zip(*before, strict=False), followers, strict=False))
        self._indexed = len(self._tokens)
