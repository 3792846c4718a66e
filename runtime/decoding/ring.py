"""Positions and capacity of the KV ring. Knows nothing about tensors, models or backends.

The graph computes slots and masks from positions, so a row of the ring is one integer here: its
next position. With window W=4 and chunk=3 (C=6), a row at position 5 takes a five-token prompt in
pieces of 1 + 3 + 1 and can then be rewound from 10 to 7, not to 6: see `Ring.rewind`.
"""

from collections.abc import Iterator

from graphs import window
from graphs.errors import MistralcError
from graphs.spec import ModelSpec, RingSpec

Capacities = dict[int | None, int]  # by window: slots of the ring

# For one query, ONNX Runtime sums values in groups of four and the rest one by one. With a multiple
# of four slots a token's sum is bit-identical, however far the ring has grown.
SLOT_MULTIPLE = 4


class ContextFullError(MistralcError):
    """A model with a layer without a window has no room for more tokens."""


class Ring:
    """Positions of `rows` sequences, and the capacity that the ring needs for them.

    The ring starts at one chunk and grows towards its full capacity by copying its prefix: until
    the first wrap, slot equals position, so a short chat never pays for a full ring. If `grows` is
    false, because the graph's capacity is fixed, the ring is full from the start.

    `positions` are the rows' next positions, `capacities` the slots that the ring must have now and
    `full` those that it grows to, both by window.
    """

    def __init__(
        self, spec: ModelSpec, ring: RingSpec, rows: int = 1, *, grows: bool = True
    ) -> None:
        self.spec, self.limits = spec, ring
        self.positions = [0] * rows
        self.written = [0] * rows  # one past the last position ever written
        self.full: Capacities = {size: ring.capacity(size) for size in spec.windows}
        self.capacities: Capacities = {
            size: _round_up(ring.chunk, full) if grows else full for size, full in self.full.items()
        }

    def room(self, row: int = 0) -> int | None:
        """How many tokens the row can still take; None if every layer has a window."""
        return None if self.spec.slides else self.limits.context - self.positions[row]

    def check_room(self, count: int, row: int = 0) -> None:
        """Raise ContextFullError unless the row can take `count` more tokens."""
        self.check_room_from(self.positions[row], count)

    def check_room_from(self, position: int, count: int) -> None:
        """Raise ContextFullError unless `count` tokens fit from `position` on."""
        if not self.spec.slides and position + count > self.limits.context:
            raise ContextFullError(
                f"{count} tokens were given at position {position}, and this bundle holds "
                f"{self.limits.context} in all. Shorten the text, or export the checkpoint again "
                "with a larger --context or with a sliding --window."
            )

    def room_of_a_piece(self, row: int = 0) -> int:
        """How many tokens the row can take in one step; 0 when it is full."""
        room = self.room(row)
        most = self.limits.chunk if room is None else min(self.limits.chunk, room)
        return next(self.pieces(most, row), 0)

    def pieces(self, count: int, row: int = 0) -> Iterator[int]:
        """Cut `count` tokens into steps of at most one chunk that cross no ring's end."""
        self.check_room(count, row)
        return window.pieces(
            self.positions[row], count, self.limits.chunk, tuple(self.full.values())
        )

    def grow(self, count: int, row: int = 0) -> bool:
        """Make room for a step of `count` tokens; True if `capacities` has changed."""
        return self.grow_to(self.positions[row] + count)

    def grow_to(self, needed: int) -> bool:
        """Make room for positions below `needed`; True if `capacities` has changed."""
        grown = {
            size: self.capacities[size] if needed <= self.capacities[size] else
            _round_up(max(needed, 2 * self.capacities[size]), full)
            for size, full in self.full.items()
        }  # fmt: skip
        changed, self.capacities = grown != self.capacities, grown
        return changed

    def advance(self, count: int, row: int = 0) -> None:
        """Record that a step of `count` tokens has run."""
        self.positions[row] += count
        self.written[row] = max(self.written[row], self.positions[row])

    def idle(self, count: int, row: int = 0) -> None:
        """Record that a step wrote `count` meaningless tokens after the row's last.

        They will be overwritten; `rewind` cannot bring back what their slots held before.
        """
        self.written[row] = max(self.written[row], self.positions[row] + count)

    def rewind(self, position: int, row: int = 0) -> None:
        """Go back to `position`, so that the next token is written there.

        Exact while the window before `position` is still in the ring, which is C - W + 1 tokens
        of slack. Raises MistralcError beyond that: forgotten keys cannot be brought back.
        """
        here, oldest = self.positions[row], self.oldest_rewind(row)
        if not 0 <= position <= here:
            raise MistralcError(
                f"A rewind to position {position} was requested; the sequence has positions 0 to "
                f"{here}."
            )
        if position != 0 and position < oldest:
            raise MistralcError(
                f"The sequence is at position {here} and can go back to {oldest} at most, not to "
                f"{position}: the sliding window has overwritten older keys. Start over with the "
                "whole text instead."
            )
        self.positions[row] = position
        if position == 0:  # a new text: nothing written so far will be read
            self.written[row] = 0

    def oldest_rewind(self, row: int = 0) -> int:
        """The earliest position that `rewind` accepts, apart from 0, which starts over."""
        end = self.written[row]  # not the position: a rewind does not restore what was overwritten
        return max(window.oldest_rewind(end, size, full) for size, full in self.full.items())


def _round_up(slots: int, full: int) -> int:
    return min(full, -(-slots // SLOT_MULTIPLE) * SLOT_MULTIPLE)
