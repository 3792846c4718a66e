"""The generation loop: plan the pieces, run, sample. Knows token ids, not text, and no backend.

One generator is one sequence on a live ring. Earlier turns stay in the ring, so the next turn feeds
only what is new, and going back by a few tokens costs nothing.
"""

from array import array
from collections import abc
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np

from runtime.backends.session import Ids, Logits, Session, check_prompt
from runtime.decoding.prompt_lookup import Draft, PromptLookup
from runtime.decoding.ring import Ring
from runtime.decoding.sampling import Floats, Sampled, Sampler, SamplingParams
from runtime.decoding.sequence import Sequence

FinishReason = Literal["stop", "length"]
Progress = Callable[[int], None]  # called with the number of prompt tokens just taken


class Generator:
    """One sequence: its tokens, its place in the ring, and sampling from its logits."""

    def __init__(self, session: Session, ring: Ring, vocab_size: int) -> None:
        self.sequence, self.ring, self.vocab_size = Sequence(session, ring), ring, vocab_size
        self.tokens = array("i")  # those in the ring; four bytes each
        self.finish_reason: FinishReason | None = None
        self.fed_from = 0  # how many tokens the last `feed_from_common_prefix` found in the ring

    @property
    def session(self) -> Session:
        """The session that the sequence is read through."""
        return self.sequence.session

    @property
    def position(self) -> int:
        """The position of the next token."""
        return self.ring.positions[0]

    def feed(self, ids: abc.Sequence[int], progress: Progress | None = None) -> Floats:
        """Write `ids` into the ring; returns the logits [V] after the last of them.

        The logits are the session's buffer, valid until the next step. Raises ContextFullError
        before anything is written if the ids do not fit.
        """
        check_prompt(ids, self.vocab_size)
        row = np.asarray(ids, np.int64)  # [n]
        for piece in self.sequence.feed(row):
            self.tokens.extend(row[piece.start : piece.start + piece.length].tolist())
            if progress is not None:
                progress(piece.length)
        last: Floats = piece.logits[-1]
        return last

    def feed_from_common_prefix(
        self, ids: abc.Sequence[int], progress: Progress | None = None
    ) -> Floats:
        """Make the sequence equal to `ids`, reusing their common prefix with the ring.

        Rewinds to where the two differ, or starts over if the ring cannot go back that far. Returns
        what `feed` returns, for the ids that were not in the ring.
        """
        self.drop_interrupted()
        common = 0
        for old, new in zip(self.tokens, ids[:-1], strict=False):  # the last gives the logits
            if old != new:
                break
            common += 1
        if common < self.ring.oldest_rewind():
            common = 0
        self.ring.check_room_from(common, len(ids) - common)  # before anything is forgotten
        check_prompt(ids, self.vocab_size)
        self.rewind(common)
        self.fed_from = common
        return self.feed(ids[common:], progress)

    def drop_interrupted(self) -> None:
        """Cut tokens and ring to the same length; an interrupted step may leave them different."""
        self.rewind(min(len(self.tokens), self.position))

    def rewind(self, position: int) -> None:
        """Forget everything from `position` on; raises MistralcError as `Ring.rewind` does."""
        self.ring.rewind(position)
        del self.tokens[position:]

    def generate(
        self,
        logits: Floats,
        params: SamplingParams,
        *,
        max_new_tokens: int | None = None,
        stop_ids: frozenset[int] = frozenset(),
        speculate: int = 0,
    ) -> Iterator[Sampled]:
        """Sample tokens, beginning with the `logits` that `feed` returned.

        With `speculate` N, up to N tokens are guessed from the text so far and verified in one
        step. Each token is sampled as it would be without, so only the speed changes, as far as a
        backend computes the same logits for a token alone and among others.

        Ends with `finish_reason` "stop" at one of `stop_ids`, which is yielded too, or "length"
        after `max_new_tokens` or at the end of the context. The last token is yielded but not
        written to the ring: `feed` it to continue after it.
        """
        sampler = Sampler(params, self.vocab_size, self.tokens)
        lookup = PromptLookup(self.tokens, speculate) if speculate else None
        room = self.ring.room()
        limit = max_new_tokens
        if room is not None:  # the last token is never written, so it needs no slot
            limit = room + 1 if limit is None else min(limit, room + 1)
        self.finish_reason = None
        if limit is not None and limit < 1:
            self.finish_reason = "length"
            return
        count, draft = 0, Draft()
        while True:
            sampled = sampler.sample(logits)
            count += 1
            if sampled.token_id in stop_ids:
                self.finish_reason = "stop"
            elif count == limit:
                self.finish_reason = "length"
            yield sampled
            if self.finish_reason is not None:
                return
            token = sampled.token_id
            if draft.confirms(token):  # the draft's step has written it to the ring
                self.ring.advance(1)
                self.tokens.append(token)
            else:
                if lookup is not None and draft.ids:
                    lookup.learn(len(draft.ids), draft.accepted)
                left = None if limit is None else limit - count - 1
                draft = self._draft_step(token, lookup, left)
            logits = draft.logits[draft.accepted]

    def _draft_step(self, token: int, lookup: PromptLookup | None, left: int | None) -> Draft:
        """Run a step for `token` and a draft of at most `left` tokens that may follow it.

        Afterwards the sequence ends with `token`, and the ring holds the draft beyond it.
        """
        ids: list[int] = []
        if lookup is not None:
            room = self.ring.room_of_a_piece() - 1
            ids = lookup.draft(token, room if left is None else min(room, left))
        if not ids:
            rows = self._step([token])
        else:
            rows = self._step([token, *ids], np.arange(len(ids) + 1))
            self.rewind(self.position - len(ids))
        return Draft(ids, rows)

    def _step(self, ids: list[int], wanted: Ids | None = None) -> Logits:
        """Run one step and record its tokens; arguments and result as in `Sequence.step`."""
        rows = self.sequence.step(ids, wanted)
        self.tokens.extend(ids)
        return rows
