"""Run many sequences on one session, each in a row of the ring. Knows nothing about requests.

A prompt is cut into chunks counted from position 0, even if part of it is already in the ring or
in the prefix cache. Only whole chunks are reused, and only those computed as whole chunks. So a
sequence is always computed by the same steps of the same shapes, and its logits are bit-identical
to those it would get alone. With a chunk of 64, a prompt of 150 tokens runs as 64 + 64 + 22; the
next prompt that begins with the same 128 tokens starts at position 128.

Decoding runs at least two rows if the session has two: single-row kernels round differently from
multi-row ones (`MatMulNBits` groups its input differently), and those for two or more rows agree.
"""

from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from graphs.errors import MistralcError
from runtime.backends.session import (
    Caches,
    Ids,
    Session,
    Slots,
    check_ids,
    check_prompt,
    fewest_rows,
)
from runtime.decoding.ring import Ring
from runtime.decoding.sampling import Floats
from runtime.scheduling.prefix_cache import Key, PrefixCache

MAX_CHUNK = 64  # tokens of a prompt in one step; other rows wait this long between two tokens


@dataclass(slots=True)
class Row:
    """What one row of the ring holds: `tokens`, the first `reusable` of them in whole chunks."""

    tokens: "array[int]" = field(default_factory=lambda: array("i"))
    reusable: int = 0
    prompt: Sequence[int] = ()  # of the sequence that has the row
    keys: Sequence[Key] = ()  # of the prompt's whole chunks
    busy: bool = False
    used: int = 0  # number of the last `claim` that took this row


class Batch:
    """The rows of a session and what they hold.

    `chunk` is the largest number of prompt tokens in one step, by default the largest divisor of
    the ring's chunk up to `MAX_CHUNK`. It has to divide the ring's chunk, so that a prompt is cut
    the same way wherever reading begins; raises MistralcError if it does not.
    """

    def __init__(
        self, session: Session, ring: Ring, prefixes: PrefixCache, chunk: int | None = None
    ) -> None:
        self.session, self.ring, self.prefixes = session, ring, prefixes
        whole = ring.limits.chunk
        self.chunk = chunk or max(n for n in range(1, MAX_CHUNK + 1) if whole % n == 0)
        if whole % self.chunk:
            raise MistralcError(
                f"The chunk for reading prompts is {self.chunk} tokens; a divisor of the bundle's "
                f"chunk {whole} is expected."
            )
        self.rows = [Row() for _ in ring.positions]
        self._min_rows = fewest_rows(session)
        self._claims = 0
        session.resize(ring.capacities)

    def check(self, ids: Sequence[int]) -> None:
        """Check a prompt.

        Raises MistralcError for ids outside the vocabulary, ContextFullError if it does not fit.
        """
        check_prompt(ids, self.ring.spec.vocab_size)
        self.ring.check_room_from(0, len(ids))

    def check_ids(self, ids: Iterable[int]) -> None:
        """Raise MistralcError for ids outside the vocabulary."""
        check_ids(ids, self.ring.spec.vocab_size)

    def has_free_row(self) -> bool:
        """Whether a sequence can be given a row."""
        return not all(row.busy for row in self.rows)

    def claim(self, ids: Sequence[int]) -> tuple[int, int]:
        """Give the prompt `ids` a free row; returns the row and the number of cached tokens.

        Takes the row for which the most tokens need not be computed. Among equals it takes one
        near the busy rows, since all rows between those run in every step, then the one whose last
        claim is oldest.
        """
        keys = self.prefixes.keys(ids, self.chunk)
        busy = [at for at, row in enumerate(self.rows) if row.busy]
        free = [at for at, row in enumerate(self.rows) if not row.busy]
        in_row = {at: self._reusable_in_row(at, ids) for at in free}
        cached = {at: self._cached(in_row[at], keys, self._reusable_part(ids)) for at in free}

        def rank(at: int) -> tuple[int, int, int]:
            first, end = self._span([*busy, at])
            return -cached[at], end - first, self.rows[at].used

        at = min(free, key=rank)
        row, self._claims = self.rows[at], self._claims + 1
        row.busy, row.prompt, row.keys, row.used = True, ids, keys, self._claims
        self._rewind(at, in_row[at])
        for here in range(in_row[at], cached[at], self.chunk):
            self._grow(here + self.chunk)
            kept = self.prefixes.kept[keys[here // self.chunk]]
            self.session.write_row(at, self._slots(here, self.chunk), kept)
            self._advance(at, self.chunk)
        row.reusable = cached[at]
        self.prefixes.touch(keys)
        return at, cached[at]

    def prefill(self, at: int) -> Floats | None:
        """Run one chunk of the row's prompt.

        Returns the logits [V] after the last token of the prompt, or None if there is more to
        read. The logits are in the session's buffer, valid until its next step.
        """
        row, here = self.rows[at], self.ring.positions[at]
        count = min(self.chunk - here % self.chunk, len(row.prompt) - here)
        self._grow(here + count)
        ids = np.array(row.prompt[here : here + count], np.int64)[None]  # [1, S]
        logits = self._run(at, ids)
        self._advance(at, count)
        if count == self.chunk:
            row.reusable = here + count
            key = row.keys[here // self.chunk]
            if self.prefixes.wants(key):
                self.prefixes.put(key, self.session.read_row(at, self._slots(here, count)))
                self.prefixes.touch(row.keys)
        return logits if here + count == len(row.prompt) else None

    def decode(self, tokens: Mapping[int, int]) -> dict[int, Floats]:
        """Write one token into each of these rows; returns the logits [V] of each.

        They are in the session's buffers, valid until its next step.
        """
        first, end = self._span(tokens)
        here = self.ring.positions[first:end]
        self._grow(max(here) + 1)
        ids = np.zeros((end - first, 1), np.int64)  # [B, 1]
        for at, token in tokens.items():
            ids[at - first, 0] = token
        positions = np.array(here, np.int64)[:, None]  # [B, 1]
        logits = self.session.step(ids, positions, np.zeros_like(ids), first)  # [B, 1, V]
        for at in range(first, end):
            if at in tokens:
                self._advance(at, 1, tokens[at])
            else:
                self.ring.idle(1, at)
        return {at: logits[at - first, 0] for at in tokens}

    def release(self, at: int) -> None:
        """Free the row. The whole chunks that it holds stay until another prompt needs the row."""
        row = self.rows[at]
        row.busy, row.prompt, row.keys = False, (), ()
        kept = row.reusable
        room = self.ring.limits.context - kept
        if not self.ring.spec.slides and room == 0:  # an idle row needs a next position
            kept -= self.chunk
        self._rewind(at, kept if kept >= self.ring.oldest_rewind(at) else 0)

    def _reusable_in_row(self, at: int, ids: Sequence[int]) -> int:
        """How many tokens of `ids` the free row holds in whole chunks that can be continued."""
        row, common = self.rows[at], 0
        most = min(row.reusable, self._reusable_part(ids))
        while common < most and row.tokens[common : common + self.chunk] == array(
            "i", ids[common : common + self.chunk]
        ):
            common += self.chunk
        return common if common >= self.ring.oldest_rewind(at) else 0

    def _cached(self, in_row: int, keys: Sequence[Key], most: int) -> int:
        """How many tokens need no computing: those in the row, then chunks of the prefix cache."""
        while in_row < most and keys[in_row // self.chunk] in self.prefixes.kept:
            in_row += self.chunk
        return in_row

    def _reusable_part(self, ids: Sequence[int]) -> int:
        """How many tokens of a prompt may be reused: whole chunks, without the last token."""
        return (len(ids) - 1) // self.chunk * self.chunk

    def _rewind(self, at: int, position: int) -> None:
        self.ring.rewind(position, at)
        row = self.rows[at]
        del row.tokens[position:]
        row.reusable = position

    def _advance(self, at: int, count: int, token: int | None = None) -> None:
        row, here = self.rows[at], self.ring.positions[at]
        row.tokens.extend(row.prompt[here : here + count] if token is None else (token,))
        self.ring.advance(count, at)

    def _grow(self, needed: int) -> None:
        if self.ring.grow_to(needed):
            self.session.resize(self.ring.capacities)

    def _span(self, rows: Collection[int]) -> tuple[int, int]:
        """First row and end of the range of rows that has to run for `rows` to run."""
        first, end = min(rows), max(rows) + 1
        missing = self._min_rows - (end - first)
        if missing > 0:
            first = max(0, first - missing)
            end = max(end, first + self._min_rows)
        return first, end

    def _slots(self, position: int, count: int) -> Slots:
        """The slots of `count` tokens from `position` on, which must not cross a ring's end."""
        begins = {size: position % full for size, full in self.ring.full.items()}
        return {size: slice(begin, begin + count) for size, begin in begins.items()}

    def _run(self, at: int, ids: Ids) -> Floats:
        """Write tokens [1, S] into one row; returns the logits [V] after the last of them."""
        count = ids.shape[1]
        steps = np.arange(count, dtype=np.int64)
        if self.session.partial:
            positions = steps[None] + self.ring.positions[at]
            logits: Floats = self.session.step(ids, positions, np.array([[count - 1]]), at)[0, 0]
            return logits
        return self._run_all_rows(at, ids, steps)

    def _run_all_rows(self, at: int, ids: Ids, steps: Ids) -> Floats:
        """The same as `_run`, for a session whose every step takes all rows.

        The other rows take filler tokens at their own next positions, which are overwritten later:
        a ring has room for a chunk beyond its window. A row in which they would cross the ring's
        end takes them a little earlier, and gets back what was there. So how a row is cut into
        steps never depends on the other rows.
        """
        count = len(steps)
        begins, saved = self._filler_positions(at, count)
        rows = len(begins)
        all_ids = np.zeros((rows, count), np.int64)  # [B, S]
        all_ids[at] = ids[0]
        positions = np.array(begins, np.int64)[:, None] + steps  # [B, S]
        logits = self.session.step(all_ids, positions, np.full((rows, 1), count - 1))
        for other, (slots, caches) in saved.items():
            self.session.write_row(other, slots, caches)
        found: Floats = logits[at, 0]
        return found

    def _filler_positions(
        self, at: int, count: int
    ) -> tuple[list[int], dict[int, tuple[Slots, Caches]]]:
        """Where each row begins a step of `count` tokens, and what to restore after it, by row."""
        chunk, context = self.ring.limits.chunk, self.ring.limits.context
        slides = self.ring.spec.slides
        begins, saved = list(self.ring.positions), {}
        for other, here in enumerate(self.ring.positions):
            if other == at:
                continue
            if any(here % full + count > full for full in self.ring.full.values()) or (
                not slides and here + count > context
            ):
                last = here if slides else min(here, context - 1)
                begins[other] = last // chunk * chunk
                slots = self._slots(begins[other], count)
                saved[other] = slots, self.session.read_row(other, slots)
            else:
                self.ring.idle(count, other)
        return begins, saved
