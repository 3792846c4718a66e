"""Read tokens into the ring step by step: grow, resize, step, advance. Knows token ids, not text.

The ring decides where a sequence stands, how large it must be and how far it can go back; the
session owns the memory. A `Sequence` is the only code that keeps the two in step for one text.
"""

from collections import abc
from typing import NamedTuple

import numpy as np

from runtime.backends.session import Ids, Logits, Session
from runtime.decoding.ring import Ring


class Piece(NamedTuple):
    """The part of a text that one step read: `length` tokens, from index `start` on.

    `logits` [T, V] are those that were asked for in this piece, none included. They are the
    session's own buffer, valid until the next step.
    """

    start: int
    length: int
    logits: Logits


class Sequence:
    """A text that is read through `session` into the first row of `ring`.

    With `rows` above 1, the rows after the first read the same tokens in the same steps, as a
    backend with fixed shapes needs; positions are kept for the first row alone.
    """

    def __init__(self, session: Session, ring: Ring, rows: int = 1) -> None:
        self.session, self.ring, self.rows = session, ring, rows
        # Buffers of a one-token step, so that decoding allocates no arrays here.
        self._ids, self._positions, self._last = np.zeros((3, rows, 1), np.int64)
        session.resize(ring.capacities)

    @property
    def position(self) -> int:
        """The position of the next token."""
        return self.ring.positions[0]

    def step(self, ids: abc.Sequence[int] | Ids, wanted: Ids | None = None) -> Logits:
        """Read `ids` [S] in one step; returns the logits [T, V] after those at `wanted` [T].

        `wanted` holds indices into `ids`; None asks for the logits after the last token only. The
        step must be a piece that `Ring.pieces` allows. The result is the session's own buffer,
        valid until the next step.
        """
        count, here = len(ids), self.ring.positions[0]
        if self.ring.grow(count):
            self.session.resize(self.ring.capacities)
        if count == 1:
            self._ids.fill(ids[0])
            self._positions.fill(here)
            tokens, positions = self._ids, self._positions
        else:
            tokens = self._in_all_rows(np.asarray(ids, np.int64))
            positions = self._in_all_rows(np.arange(here, here + count))
        if wanted is None:
            self._last.fill(count - 1)
            indices = self._last
        else:
            indices = self._in_all_rows(wanted)
        logits = self.session.step(tokens, positions, indices)
        self.ring.advance(count)
        first: Logits = logits[0]
        return first

    def feed(self, ids: Ids, wanted: Ids | None = None) -> abc.Iterator[Piece]:
        """Read `ids` [n] in as few steps as the ring allows; yields each piece once it was read.

        `wanted` holds ascending indices into `ids` after which logits are asked for; None asks for
        those after the last token only. Raises ContextFullError before anything is read if the
        ids do not fit.
        """
        if wanted is None:
            wanted = np.array([len(ids) - 1])
        start = 0
        for count in self.ring.pieces(len(ids)):
            low, high = wanted.searchsorted((start, start + count))
            indices = wanted[low:high] - start
            # A step has to return something: where nothing is wanted, the last token's logits.
            logits = self.step(ids[start : start + count], indices if len(indices) else None)
            yield Piece(start, count, logits[: len(indices)])
            start += count

    def _in_all_rows(self, values: Ids) -> Ids:
        """The values [n] once for each row: [rows, n]."""
        return np.tile(values, (self.rows, 1))
