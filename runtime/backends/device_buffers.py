"""Device memory of a session: ring, inputs and logits. Knows no backend.

Addresses never change, so a decode step can be captured once and replayed. Ids, positions and
indices are in one block on the host and one on the device, so that one copy transfers all three.
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

_ALIGNMENT = 256  # bytes, as cudaMalloc aligns; each input begins on such a boundary


@dataclass(frozen=True, slots=True)
class LogitsBuffer:
    """One output: on the device, in pinned memory, and as float32 that outlives both."""

    device: int
    host: Bytes
    result: NDArray[np.float32]  # one-dimensional


class StepBuffers:
    """All memory that a session's steps use, except the backend's own; `gpu` owns and frees it.

    `addresses` and `shapes` are by tensor name; `past_*` and `present_*` share an address.
    """

    def __init__(self, gpu: Gpu, contract: GraphContract, batch: int) -> None:
        self._gpu, self._contract, self._batch = gpu, contract, batch
        self._spec, self._item_size = contract.spec, item_size(contract.activation)
        sizes = contract.sizes(batch=batch, tokens=1, wanted=1)
        tensors = (*contract.inputs, *contract.outputs)
        self.shapes = {tensor.name: tensor.sized(sizes) for tensor in tensors}
        self.addresses: dict[str, int] = {}
        for tensor in contract.inputs:
            if tensor.name not in STEP_INPUTS:
                address = gpu.allocate(self._cache_bytes(tensor.name), "the KV ring")
                present = tensor.name.replace("past_", "present_", 1)
                self.addresses[tensor.name] = self.addresses[present] = address
        self._stride = -(-8 * batch * contract.ring.chunk // _ALIGNMENT) * _ALIGNMENT
        self._block = gpu.pinned(len(STEP_INPUTS) * self._stride, "a step's tokens")
        self._ids = self._block.view(np.int64).reshape(len(STEP_INPUTS), -1)
        self._device = gpu.allocate(self._block.nbytes, "a step's tokens")
        for i, name in enumerate(STEP_INPUTS):
            self.addresses[name] = self._device + i * self._stride
        self._one = self._logits_buffer(1)
        self._many: LogitsBuffer | None = None

    def write(self, ids: Ids, positions: Ids, indices: Ids) -> None:
        """Write a step's tokens [B, S], positions [B, S] and indices [B, T] to pinned memory."""
        for row, values in zip(self._ids, (ids, positions, indices), strict=True):
            row[: values.size] = values.ravel()

    def copy_in(self) -> None:
        """Enqueue the copy of what `write` wrote to the device."""
        self._gpu.copy_in(self._device, self._block)

    def logits(self, wanted: int) -> LogitsBuffer:
        """The output buffer for `wanted` rows of logits.

        Decoding asks for one row and always gets the same buffer. The buffer for more rows holds
        a chunk of them and is allocated on first use.
        """
        if wanted == 1:
            return self._one
        if self._many is None:
            self._many = self._logits_buffer(self._contract.ring.chunk)
        return self._many

    def copy_out(self, wanted: int, row: int | None = None) -> None:
        """Enqueue the copy of `wanted` logits of each sequence to pinned memory.

        With `row`, the device's buffer holds the logits of that sequence alone, from its start on.
        """
        buffer, nbytes = self.logits(wanted), self._logits_bytes(wanted)
        host = buffer.host[:nbytes]
        if row is not None:
            host = host.reshape(self._batch, -1)[row]
        self._gpu.copy_out(host, buffer.device)

    def result(self, wanted: int) -> Logits:
        """The copied logits [B, T, V] as float32, valid until the next step."""
        buffer = self.logits(wanted)
        count = self._batch * wanted * self._spec.vocab_size
        found = buffer.result[:count]
        to_float32(buffer.host[: self._logits_bytes(wanted)], self._contract.activation, found)
        return found.reshape(self._batch, wanted, self._spec.vocab_size)

    def clear_ring(self) -> None:
        """Enqueue zeroing the whole ring."""
        for name, address in self.addresses.items():
            if name.startswith("past_"):
                self._gpu.clear(address, self._cache_bytes(name))

    def row_address(self, name: str, row: int) -> int:
        """The address of one row of a cache."""
        return self.addresses[name] + row * self._cache_bytes(name) // self._batch

    def read_row(self, row: int, slots: Slots) -> Caches:
        """Copy these slots of one row out of the ring; half precision comes as uint16 bits."""
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
        """Write what `read_row` returned for as many slots; other rows are not touched."""
        for part, address in self._parts(row, slots, caches):
            self._gpu.copy_in(address, part)
        self._gpu.wait()

    def _parts(self, row: int, slots: Slots, caches: Caches) -> Iterator[tuple[Bytes, int]]:
        """Yield each head of `caches` with its device address: a head's slots are contiguous."""
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
