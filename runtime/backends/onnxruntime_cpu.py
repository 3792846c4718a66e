"""A session on ONNX Runtime CPU, with the ring updated in place. Knows nothing about text.

Every cache is a NumPy array bound as both `past_*` and `present_*`: the graph writes the new slots
and nothing is copied. A one-token step runs on a binding that is kept for its rows, with buffers
that live as long as the ring, so decoding allocates nothing. Longer steps run row by row, each on
its own part of the caches, because `GroupQueryAttention` takes several queries in one row only.
"""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from graphs.build import Build
from graphs.contract import PADDED, GraphContract
from graphs.dtypes import ELEMENT_TYPES, item_size
from graphs.errors import MistralcError
from graphs.spec import ModelSpec
from runtime.backends.session import Caches, Ids, Logits, Slots
from runtime.system.malloc import huge_pages

NO_FLASH = "ORT_GQA_DISABLE_FLASH_ATTENTION"  # environment variable, read at session creation
KEPT_BINDINGS = 16  # of one-token steps; making one takes 0.5 ms and 70 KB for 30 layers

# Bytes of one head's keys up to which attention without blocks was faster: 267 us against 368 for
# SmolLM2's layers at 4,096 tokens, 263 against 284 for Mistral-7B's at 512 and 1,154 against 1,160
# at 2,048, but 2,628 against 2,346 at 4,096 (2 threads, 1 MiB of L2 cache each).
MAX_KEY_BYTES_WITHOUT_FLASH = 2 << 20


class _DecodeStep(NamedTuple):
    """A one-token step of some rows: its binding, and the buffer of its logits [n, 1, V]."""

    binding: ort.IOBinding
    logits: Logits


class OrtSession:
    """`model.onnx` loaded on ONNX Runtime CPU with a ring of `batch` rows.

    - `fuse_qdq` lets ONNX Runtime fuse QuantizeLinear and DequantizeLinear into integer operators.
      It must be off for float8: version 1.31 fuses those into integer products too, and then
      rejects them.
    - `pack_together` packs weights with all threads, each on its own heap.
    - `flash` computes attention in blocks. Without it, `GroupQueryAttention` computes all scores
      of a step before it weights the values. That is faster for one token as long as the keys of a
      head fit into the processor's cache, and takes a buffer of heads x S x slots x 4 bytes.
    - `padded` is the number of slots that the graph writes beyond the last token's in layers
      without a window. Rows of such a graph run one after another.
    """

    def __init__(
        self,
        model: Path,
        spec: ModelSpec,
        *,
        batch: int = 1,
        threads: int | None = None,
        fuse_qdq: bool = True,
        pack_together: bool = True,
        flash: bool = False,
        padded: int = 0,
    ) -> None:
        self.spec, self.batch, self.partial = spec, batch, True
        self._padded = padded
        # A padded step has several queries, which `GroupQueryAttention` takes in one row only.
        self._row_by_row = padded > 0 and None in spec.windows
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0  # 0 lets ONNX Runtime take the physical cores
        options.inter_op_num_threads = 1
        # Planned memory reuse makes steps up to 9% slower than the arena's own reuse, and takes
        # 6 MB more.
        options.enable_mem_reuse = False
        if pack_together:
            options.add_session_config_entry("session.prepack.enable_parallel", "1")
        if not fuse_qdq:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        try:
            with nullcontext() if flash else _environment_variable(NO_FLASH, "1"):
                self._session = ort.InferenceSession(model, options, ["CPUExecutionProvider"])
        except Exception as error:
            raise MistralcError(
                f"ONNX Runtime {ort.__version__} could not load {model}: {error}. Export the "
                "bundle again with this version of mistralc, or install the version of ONNX "
                "Runtime that its manifest names."
            ) from error
        self._capacities: dict[int | None, int] = {}
        self._caches: dict[str, NDArray[np.float32]] = {}
        self._ids, self._positions, self._indices = np.zeros((3, batch, 1), np.int64)
        self._logits = np.zeros((batch, 1, spec.vocab_size), np.float32)
        self._many = np.empty((0, spec.vocab_size), np.float32)  # logits of longer steps
        # By first row and end; the step that ran last is the last entry.
        self._decode_steps: dict[tuple[int, int], _DecodeStep] = {}
        self._rows = [self._session.io_binding() for _ in range(batch)]

    def resize(self, capacities: Mapping[int | None, int]) -> None:
        """Give the ring these capacities, by window, and keep the prefix that it holds."""
        if capacities == self._capacities:
            return
        heads, head_dim = self.spec.num_key_value_heads, self.spec.head_dim
        padded = {size: n + self._padded * (size is None) for size, n in capacities.items()}
        shapes = [(self.batch, heads, padded[size], head_dim) for size in self.spec.layer_windows]
        for kind in ("key", "value"):
            # One array for all layers: NumPy asks for huge pages only from 4 MiB on.
            memory = np.zeros(sum(map(math.prod, shapes)), np.float32)
            for i, shape in enumerate(shapes):
                flat, memory = np.split(memory, [math.prod(shape)])
                cache = flat.reshape(shape)
                old = self._caches.get(f"{kind}.{i}")
                if old is not None:
                    kept = min(old.shape[2], cache.shape[2])
                    cache[:, :, :kept] = old[:, :, :kept]
                self._caches[f"{kind}.{i}"] = cache
        self._decode_steps.clear()
        for row, binding in enumerate(self._rows):
            self._bind_caches(binding, slice(row, row + 1))
        self._capacities = dict(capacities)

    def step(
        self, input_ids: Ids, position_ids: Ids, logits_indices: Ids, first: int = 0
    ) -> Logits:
        """Write tokens [n, S] at positions [n, S] of the rows from `first` on; others are idle.

        Returns the logits [n, T, V] at the indices [n, T], in the session's own buffer, valid until
        the next step.
        """
        rows = slice(first, first + len(input_ids))
        alone = len(input_ids) == 1 or not self._row_by_row
        if alone and input_ids.shape[1] == 1 and logits_indices.shape[1] == 1:
            self._ids[rows], self._positions[rows] = input_ids, position_ids
            decode = self._decode_step(rows)
            self._session.run_with_iobinding(decode.binding)
            return decode.logits
        logits = self._buffer(len(input_ids), logits_indices.shape[1])
        for row, binding in enumerate(self._rows[rows]):
            at = slice(row, row + 1)
            step = input_ids[at], position_ids[at], logits_indices[at], logits[at]
            self._bind_step(binding, *step)
            self._session.run_with_iobinding(binding)
        return logits

    def read_row(self, row: int, slots: Slots) -> Caches:
        """Copy these slots of one row out of the ring, as float32."""
        return [cache[row, :, slots[size]].copy() for size, cache in self._in_order()]

    def write_row(self, row: int, slots: Slots, caches: Caches) -> None:
        """Write what `read_row` returned for as many slots; other rows are not touched."""
        for (size, cache), kept in zip(self._in_order(), caches, strict=True):
            cache[row, :, slots[size]] = kept

    def _in_order(self) -> Iterator[tuple[int | None, NDArray[np.float32]]]:
        """Yield each layer's window and key cache, then its window and value cache."""
        for i, size in enumerate(self.spec.layer_windows):
            for kind in ("key", "value"):
                yield size, self._caches[f"{kind}.{i}"]

    def _decode_step(self, rows: slice) -> _DecodeStep:
        """The one-token step of these rows; the most recent `KEPT_BINDINGS` are kept."""
        found = self._decode_steps.pop((rows.start, rows.stop), None)
        if found is None:
            if len(self._decode_steps) == KEPT_BINDINGS:
                del self._decode_steps[next(iter(self._decode_steps))]
            found = _DecodeStep(self._session.io_binding(), self._logits[rows])
            self._bind_caches(found.binding, rows)
            inputs = self._ids[rows], self._positions[rows], self._indices[rows]
            self._bind_step(found.binding, *inputs, found.logits)
        self._decode_steps[rows.start, rows.stop] = found
        return found

    def _buffer(self, rows: int, wanted: int) -> Logits:
        """A buffer for `wanted` rows of logits in each of `rows` sequences: [n, T, V]."""
        count = rows * wanted
        if len(self._many) < count:
            self._many = np.empty((count, self.spec.vocab_size), np.float32)
        return self._many[:count].reshape(rows, wanted, -1)

    def _bind_caches(self, binding: ort.IOBinding, rows: slice) -> None:
        for name, cache in self._caches.items():
            value = ort.OrtValue.ortvalue_from_numpy(cache[rows])  # shares the array's memory
            binding.bind_ortvalue_input(f"past_{name}", value)
            binding.bind_ortvalue_output(f"present_{name}", value)

    @staticmethod
    def _bind_step(
        binding: ort.IOBinding, ids: Ids, positions: Ids, indices: Ids, logits: Logits
    ) -> None:
        for name, array in (
            ("input_ids", ids),
            ("position_ids", positions),
            ("logits_indices", indices),
        ):
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))


def open_session(
    model: Path, build: Build, file_bytes: int = 0, *, batch: int = 1, threads: int | None = None
) -> OrtSession:
    """Load `model` with the options that are fastest for the build's precision and shape.

    `file_bytes` is the size of the model with its weights; 0 uses no huge pages.
    """
    on_huge_pages = _huge_page_bytes(build, file_bytes)
    codes = build.precision.activation_codes
    with huge_pages(on_huge_pages):
        return OrtSession(
            model, build.spec, batch=batch, threads=threads,
            fuse_qdq=codes is None or ELEMENT_TYPES[codes].is_integer,
            pack_together=not on_huge_pages,
            flash=_key_bytes_per_head(build.contract) > MAX_KEY_BYTES_WITHOUT_FLASH,
            padded=PADDED if build.batch_invariant else 0,
        )  # fmt: skip


def _huge_page_bytes(build: Build, file_bytes: int) -> int:
    """Bytes for quantized weights as ONNX Runtime packs them; 1.3 times the files were measured.

    0 for float weights, where loading time matters more. On a host that takes free memory back
    from its virtual machines and clears it again, huge pages raised the loading time of SmolLM2's
    538 MB from 0.6 to 1.9 s.
    """
    if not build.precision.quantized:
        return 0
    return 3 * file_bytes // 2


def _key_bytes_per_head(contract: GraphContract) -> int:
    """Bytes of one head's keys in a full ring; 0 if every layer has a window."""
    spec, ring = contract.spec, contract.ring
    slots = ring.capacity(None) if None in spec.windows else 0
    return slots * spec.head_dim * item_size(contract.activation)


@contextmanager
def _environment_variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable within the context, unless the user has set it."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
