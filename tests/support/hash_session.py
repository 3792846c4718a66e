"""A fake session whose every token depends on all keys that the row's ring holds.

Each layer's "key" is a hash of the token and of all visible keys. A key of another row, of another
text, or one that should have been overwritten changes every later token. Like a kernel whose
rounding depends on the shape of a step, the hash includes the step's size: tokens agree only if
each was computed in a step of the same shape.
"""

from collections.abc import Mapping

import numpy as np

from graphs import window
from graphs.spec import ModelSpec, RingSpec
from runtime.backends.session import Caches, Ids, Logits, Slots
from runtime.backends.step_bounds import check_step

MODULUS = 2**31 - 1


class HashSession:
    """A session of `batch` rows; if not `partial`, rings are full and every step takes all rows.

    `steps` records the positions of each step by row.
    """

    def __init__(self, spec: ModelSpec, ring: RingSpec, batch: int, *, partial: bool) -> None:
        self.spec, self.ring, self.batch, self.partial = spec, ring, batch, partial
        self.rings: dict[int | None, np.ndarray] = {}
        self.steps: list[dict[int, list[int]]] = []
        self.fails: Exception | None = None

    def resize(self, capacities: Mapping[int | None, int]) -> None:
        for size, capacity in capacities.items():
            new = np.full((self.batch, capacity), -1, np.int64)
            old = self.rings.get(size)
            if old is not None:
                kept = min(capacity, old.shape[1])
                new[:, :kept] = old[:, :kept]
            self.rings[size] = new

    def step(
        self, input_ids: Ids, position_ids: Ids, logits_indices: Ids, first: int = 0
    ) -> Logits:
        if self.fails is not None:
            raise self.fails
        rows, count = input_ids.shape
        if self.partial:
            check_step(self.spec, self.ring, rows, input_ids, position_ids, logits_indices)
        else:
            check_step(
                self.spec, self.ring, self.batch, input_ids, position_ids, logits_indices, first
            )
        assert input_ids.flags.c_contiguous, "a session binds the memory of the array"
        self.steps.append({first + row: position_ids[row].tolist() for row in range(rows)})
        shape = 1000 * count + (min(rows, 2) if count == 1 else 0)
        logits = np.tile(np.arange(self.spec.vocab_size, dtype=np.float32), (rows, 1, 1))
        logits /= self.spec.vocab_size
        for row in range(rows):
            for token, position in zip(input_ids[row], position_ids[row], strict=True):
                last = int(position_ids[row, -1])
                key = self._write(first + row, int(token), int(position), last, shape)
            logits[row, 0, key % self.spec.vocab_size] = 5
        return logits

    def _write(self, row: int, token: int, position: int, last: int, shape: int) -> int:
        """Write a key, attend to all visible keys, and return the hash."""
        seen = [token, position, shape]
        for size, ring in self.rings.items():
            capacity = ring.shape[1]
            assert last < capacity or capacity == self.ring.capacity(size), (
                "the ring must grow first"
            )
            slots = np.arange(capacity)
            at = window.slot_position(last, slots, capacity)
            visible = window.visible(position, at, size) & (at != position)
            seen += [int((ring[row, visible] * (at[visible] + 7)).sum() % MODULUS)]
        key = 17
        for number in seen:
            key = (key * 1_000_003 + number) % MODULUS
        for ring in self.rings.values():
            ring[row, position % ring.shape[1]] = key
        return key

    def read_row(self, row: int, slots: Slots) -> Caches:
        return [ring[row, slots[size]].copy() for size, ring in self.rings.items()]

    def write_row(self, row: int, slots: Slots, caches: Caches) -> None:
        for (size, ring), kept in zip(self.rings.items(), caches, strict=True):
            ring[row, slots[size]] = kept
