"""Many sequences on one session, each in a row of the ring. Knows no request, no thread, no text.

A prompt is cut into chunks counted from position 0, whatever part of it is found in the ring or
among the kept chunks. Only whole chunks are reused, and only such as were computed as whole chunks:
then every number that a sequence sees is computed by the same step of the same shape each time,
and equals in bits what the sequence would have computed alone. With a chunk of 64, a prompt of 150
tokens is run as 64 + 64 + 22; the next prompt that begins alike starts at 128.

Decoding takes two rows at least where there are two: kernels for one row alone round otherwise than
those for many (`MatMulNBits` rounds its input in other groups), and those for two and more agree.
"""

from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from graphs.errors import MistralcError
from runtime.backends.session import Ids, Session, Slots, check_ids, check_prompt, fewest_rows
from runtime.decoding.ring import Ring
from runtime.decoding.sampling import Floats
from runtime.scheduling.prefix_cache import Key, PrefixStore

CHUNK = 64  # most tokens of a prompt in one step: what the other rows wait for between two tokens


@dataclass(slots=True)
class Row:
    """What one row of the ring holds: `tokens`, of which the first `settled` are whole chunks."""

    tokens: "array[int]" = field(default_factory=lambda: array("i"))
    settled: int = 0
    prompt: Sequence[int] = ()  # of the sequence that has it
    keys: Sequence[Key] = ()  # of the prompt's whole chunks
    busy: bool = False
    used: int = 0  # when it was last given away, in sequences


class Batch:
    """The rows of a session and what they hold.

    `chunk` is the most tokens of a prompt in one step, by default the largest divisor of the
    ring's chunk up to `CHUNK`. It has to divide it, for pieces to be the same wherever they begin.
    """

    def __init__(
        self,
        session: Session,
        ring: Ring,
        vocab_size: int,
        prefixes: PrefixStore,
        chunk: int | None = None,
    ) -> None:
        self.session, self.ring = session, ring
        self.vocab_size, self.prefixes = vocab_size, prefixes
        most = ring.limits.chunk
        self.chunk = chunk or max(n for n in range(1, CHUNK + 1) if most % n == 0)
        if most % self.chunk:
            raise MistralcError(
                f"Prompts were to be read {self.chunk} tokens at a time; a divisor of the bundle's "
                f"chunk {most} is expected."
            )
        self.rows = [Row() for _ in ring.positions]
        self.least = fewest_rows(session)
        self._count = 0
        session.resize(ring.capacities)

    def check(self, ids: Sequence[int]) -> None:
        """Raise MistralcError unless `ids` are this model's, ContextFullError unless they fit."""
        check_prompt(ids, self.vocab_size)
        self.ring.check_room_from(0, len(ids))

    def check_ids(self, ids: Iterable[int]) -> None:
        """Raise MistralcError unless all of `ids` are this model's."""
        check_ids(ids, self.vocab_size)

    def room(self) -> bool:
        """Whether a row is free."""
        return not all(row.busy for row in self.rows)

    def claim(self, ids: Sequence[int]) -> tuple[int, int]:
        """Give the prompt `ids` a free row; returns it and how many of the tokens it has already.

        It is the row with which most of them need not be computed; among equals one beside those
        that are busy, because all between them run in every step; then the one idle longest.
        """
        keys = self.prefixes.keys(ids, self.chunk)
        busy = [at for at, row in enumerate(self.rows) if row.busy]
        free = [at for at, row in enumerate(self.rows) if not row.busy]
        held = {at: self._held(at, ids) for at in free}
        known = {at: self._known(held[at], keys, self._whole(ids)) for at in free}

        def rank(at: int) -> tuple[int, int, int]:
            first, end = self._span([*busy, at])
            return -known[at], end - first, self.rows[at].used

        at = min(free, key=rank)
        row, self._count = self.rows[at], self._count + 1
        row.busy, row.prompt, row.keys, row.used = True, ids, keys, self._count
        self._rewind(at, held[at])
        for here in range(held[at], known[at], self.chunk):
            self._grow(here + self.chunk)
            kept = self.prefixes.kept[keys[here // self.chunk]]
            self.session.write_row(at, self._slots(here, self.chunk), kept)
            self._advance(at, self.chunk)
        row.settled = known[at]
        self.prefixes.renew(keys)
        return at, known[at]

    def prefill(self, at: int) -> Floats | None:
        """Run one chunk of the row's prompt; returns the logits [V] after its last token.

        None says that there is more. The logits are the session's buffer, valid until its next
        step.
        """
        row, here = self.rows[at], self.ring.positions[at]
        count = min(self.chunk - here % self.chunk, len(row.prompt) - here)
        self._grow(here + count)
        ids = np.array(row.prompt[here : here + count], np.int64)[None]  # [1, S]
        logits = self._run(at, ids)
        self._advance(at, count)
        if count == self.chunk:
            row.settled = here + count
            key = row.keys[here // self.chunk]
            if self.prefixes.wants(key):
                self.prefixes.put(key, self.session.read_row(at, self._slots(here, count)))
                self.prefixes.renew(row.keys)
        return logits if here + count == len(row.prompt) else None

    def decode(self, tokens: Mapping[int, int]) -> dict[int, Floats]:
        """Write one token into each of these rows; returns the logits [V] of each.

        They are the session's buffers, valid until its next step.
        """
        first, end = self._span(tokens)
        here = self.ring.positions[first:end]
        self._grow(max(here) + 1)
        ids = np.zeros((end - first, 1), np.int64)
        for at, token in tokens.items():
            ids[at - first, 0] = token
        positions = np.array(here, np.int64)[:, None]
        logits = self.session.step(ids, positions, np.zeros_like(ids), first)
        for at in range(first, end):
            if at in tokens:
                self._advance(at, 1, tokens[at])
            else:
                self.ring.idle(1, at)
        return {at: logits[at - first, 0] for at in tokens}

    def release(self, at: int) -> None:
        """Take the row back. What it holds in whole chunks stays until another prompt needs it."""
        row = self.rows[at]
        row.busy, row.prompt, row.keys = False, (), ()
        kept = row.settled
        room = self.ring.limits.context - kept
        if not self.ring.spec.slides and room == 0:  # an idle row has to have a next position
            kept -= self.chunk
        self._rewind(at, kept if kept >= self.ring.oldest_rewind(at) else 0)

    def _held(self, at: int, ids: Sequence[int]) -> int:
        """How many tokens of `ids` the free row holds that can be gone on from."""
        row, common = self.rows[at], 0
        whole = min(row.settled, self._whole(ids))
        while common < whole and row.tokens[common : common + self.chunk] == array(
            "i", ids[common : common + self.chunk]
        ):
            common += self.chunk
        return common if common >= self.ring.oldest_rewind(at) else 0

    def _known(self, held: int, keys: Sequence[Key], whole: int) -> int:
        """How far a prompt is known: what is held, then chunks of the store up to a gap."""
        while held < whole and keys[held // self.chunk] in self.prefixes.kept:
            held += self.chunk
        return held

    def _whole(self, ids: Sequence[int]) -> int:
        """How many of a prompt's tokens may be found: whole chunks, and not the last token."""
        return (len(ids) - 1) // self.chunk * self.chunk

    def _rewind(self, at: int, position: int) -> None:
        self.ring.rewind(position, at)
        row = self.rows[at]
        del row.tokens[position:]
        row.settled = position

    def _advance(self, at: int, count: int, token: int | None = None) -> None:
        row, here = self.rows[at], self.ring.positions[at]
        row.tokens.extend(row.prompt[here : here + count] if token is None else (token,))
        self.ring.advance(count, at)

    def _grow(self, needed: int) -> None:
        if self.ring.grow_to(needed):
            self.session.resize(self.ring.capacities)

    def _span(self, rows: Collection[int]) -> tuple[int, int]:
        """First row and end of the rows that have to run so that `rows` do."""
        first, end = min(rows), max(rows) + 1
        short = self.least - (end - first)
        if short > 0:
            first = max(0, first - short)
            end = max(end, first + self.least)
        return first, end

    def _slots(self, position: int, count: int) -> Slots:
        """Where the tokens from `position` on are; they do not cross a ring's end."""
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
        return self._run_beside(at, ids, steps)

    def _run_beside(self, at: int, ids: Ids, steps: Ids) -> Floats:
        """The same where every row has to take as many tokens.

        The others take theirs at their own next positions, where they are overwritten later: a
        ring has room for a chunk beyond its window. A row where they would cross the ring's end
        takes them a little earlier, and what was there is put back. So no row's pieces depend on
        the others.
        """
        count, chunk, context = len(steps), self.ring.limits.chunk, self.ring.limits.context
        slides = self.ring.spec.slides
        begins, kept = list(self.ring.positions), {}
        for other, here in enumerate(self.ring.positions):
            if other == at:
                continue
            if any(here % full + count > full for full in self.ring.full.values()) or (
                not slides and here + count > context
            ):
                last = here if slides else min(here, context - 1)
                begins[other] = last // chunk * chunk
                slots = self._slots(begins[other], count)
                kept[other] = slots, self.session.read_row(other, slots)
            else:
                self.ring.idle(count, other)
        rows = len(begins)
        many = np.zeros((rows, count), np.int64)
        many[at] = ids[0]
        positions = np.array(begins, np.int64)[:, None] + steps
        logits = self.session.step(many, positions, np.full((rows, 1), count - 1))
        for other, (slots, caches) in kept.items():
            self.session.write_row(other, slots, caches)
        found: Floats = logits[at, 0]
        return found
