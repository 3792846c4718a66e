"""Where a step's numbers lie on the device: ring, inputs, logits. Knows no backend.

Addresses never change, so that a decode step can be captured once and replayed. Ids, positions
and indices lie in one block, host and device alike, and go over in one copy.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graphs.contract import STEP_INPUTS, GraphContract
from graphs.dtypes import item_size
from runtime.backends.cuda_device import Bytes, Gpu
from runtime.backends.float_conversion import to_float32
from runtime.backends.session import Caches, Ids, Logits, Slots

_ALIGNMENT = 256  # bytes, what cudaMalloc aligns to; each input begins on such a boundary


@dataclass(frozen=True, slots=True)
class LogitsBuffer:
    """One output: on the device, in pinned memory, and as float32, which outlives both."""

    device: int
    host: Bytes
    result: NDArray[np.float32]  # one-dimensional


class StepBuffers:
    """All memory that a session's steps use, but for the backend's own. It belongs to `gpu`."""

    def __init__(self, gpu: Gpu, contract: GraphContract, batch: int) -> None:
        self._gpu, self._contract, self._batch = gpu, contract, batch
        self._spec, self._item_size = contract.spec, item_size(contract.activation)
        sizes = contract.sizes(batch=batch, tokens=1, wanted=1)
        self.shapes = {row.name: row.sized(sizes) for row in (*contract.inputs, *contract.outputs)}
        self.addresses: dict[str, int] = {}  # by tensor name; past and present share one
        for row in contract.inputs:
            if row.name not in STEP_INPUTS:
                address = gpu.allocate(self._cache_bytes(row.name), "the KV ring")
                present = row.name.replace("past_", "present_", 1)
                self.addresses[row.name] = self.addresses[present] = address
        self._stride = -(-8 * batch * contract.ring.chunk // _ALIGNMENT) * _ALIGNMENT
        self._block = gpu.pinned(len(STEP_INPUTS) * self._stride, "a step's tokens")
        self._ids = self._block.view(np.int64).reshape(len(STEP_INPUTS), -1)
        self._device = gpu.allocate(self._block.nbytes, "a step's tokens")
        for i, name in enumerate(STEP_INPUTS):
            self.addresses[name] = self._device + i * self._stride
        self._one = self._logits_buffer(1)
        self._many: LogitsBuffer | None = None

    def write(self, ids: Ids, positions: Ids, indices: Ids) -> None:
        """Put a step's tokens [B, S], positions [B, S] and indices [B, T] into pinned memory."""
        for row, values in zip(self._ids, (ids, positions, indices), strict=True):
            row[: values.size] = values.ravel()

    def copy_in(self) -> None:
        """Send what `write` left to the device, in the order of the stream."""
        self._gpu.copy_in(self._device, self._block)

    def logits(self, wanted: int) -> LogitsBuffer:
        """The output for `wanted` rows; that for one row, which decoding uses, is always the same.

        That for more holds a chunk of them, and is made when it is first asked for.
        """
        if wanted == 1:
            return self._one
        if self._many is None:
            self._many = self._logits_buffer(self._contract.ring.chunk)
        return self._many

    def copy_out(self, wanted: int) -> None:
        """Fetch the logits of `wanted` rows, in the order of the stream."""
        buffer = self.logits(wanted)
        self._gpu.copy_out(buffer.host[: self._logits_bytes(wanted)], buffer.device)

    def result(self, wanted: int) -> Logits:
        """The fetched logits [B, T, V] as float32, valid until the next step."""
        buffer = self.logits(wanted)
        count = self._batch * wanted * self._spec.vocab_size
        found = buffer.result[:count]
        to_float32(buffer.host[: self._logits_bytes(wanted)], self._contract.activation, found)
        return found.reshape(self._batch, wanted, self._spec.vocab_size)

    def clear_ring(self) -> None:
        """Empty the ring, in the order of the stream."""
        for name, address in self.addresses.items():
            if name.startswith("past_"):
                self._gpu.clear(address, self._cache_bytes(name))

    def read_row(self, row: int, slots: Slots) -> Caches:
        """Copy these slots of one row out of the ring; half precision comes as its bits, uint16."""
        item = np.dtype(np.float32 if self._item_size == 4 else np.uint16)
        heads, dim = self._spec.num_key_value_heads, self._spec.head_dim
        found: Caches = []
        for size in (size for size in self._spec.layer_windows for _ in ("key", "value")):
            count = slots[size].stop - slots[size].start
            found.append(np.empty((heads, count, dim), item))
        for part, address in self._parts(row, slots, found):
            self._gpu.copy_out(part, address)
        self._gpu.wait()
        return found

    def write_row(self, row: int, slots: Slots, caches: Caches) -> None:
        """Put back what `read_row` gave for as many slots; the other rows are not touched."""
        for part, address in self._parts(row, slots, caches):
            self._gpu.copy_in(address, part)
        self._gpu.wait()

    def _parts(self, row: int, slots: Slots, caches: Caches) -> Iterator[tuple[Bytes, int]]:
        """Where each head of `caches` is on the device: its slots lie one after the other."""
        names = [name for name in self.addresses if name.startswith("past_")]
        windows = [size for size in self._spec.layer_windows for _ in ("key", "value")]
        for name, size, cache in zip(names, windows, caches, strict=True):
            _, heads, capacity, dim = self.shapes[name]
            slot = dim * self._item_size  # bytes
            for head in range(heads):
                at = (row * heads + head) * capacity + slots[size].start
                part = np.ascontiguousarray(cache[head]).view(np.uint8).reshape(-1)
                yield part, self.addresses[name] + at * slot

    def _cache_bytes(self, name: str) -> int:
        return int(np.prod(self.shapes[name])) * self._item_size

    def _logits_bytes(self, wanted: int) -> int:
        return self._batch * wanted * self._spec.vocab_size * self._item_size

    def _logits_buffer(self, wanted: int) -> LogitsBuffer:
        nbytes = self._logits_bytes(wanted)
        return LogitsBuffer(
            self._gpu.allocate(nbytes, "the logits"),
            self._gpu.pinned(nbytes, "the logits"),
            np.empty(self._batch * wanted * self._spec.vocab_size, np.float32),
        )
