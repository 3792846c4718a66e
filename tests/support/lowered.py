"""Run a lowered float32 graph on ONNX Runtime CPU as a device would, and compare it with PyTorch.

The ring is full from the start and updated in place, and a prompt runs in all rows at once. Each
row has a text of its own and stands at a position of its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from exporter.decoder.model import Decoder
from graphs import window
from graphs.build import Build
from graphs.contract import STEP_INPUTS
from runtime.backends.session import Ids, Logits
from tests.support import tiny

TOLERANCE = 2e-5
"""Share of the largest logit. Only the order of summation differs from PyTorch's: 2e-6 was seen."""


class GraphSession:
    """A lowered graph with full rings of `batch` rows; a step takes some of the rows.

    `GroupQueryAttention` takes several tokens in one row only, so a graph that has it runs such
    steps row by row, as the sessions do.
    """

    def __init__(self, model: ir.Model, build: Build, batch: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        # ONNX Runtime makes MatMulNBits of DequantizeLinear and MatMul, and would round its inputs.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        self._session = ort.InferenceSession(
            ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"]
        )
        self._apart = "grouped" in build.attention.values()
        sizes = build.contract.sizes(batch=batch, tokens=1, wanted=1)
        self._caches: Mapping[str, NDArray[np.float32]] = {
            tensor.name: np.full(tensor.sized(sizes), 7, np.float32)  # no row may read what is old
            for tensor in build.contract.inputs
            if tensor.name.startswith("past_")
        }

    def step(self, ids: Ids, positions: Ids, first: int = 0) -> Logits:
        """Write tokens [n, S] into the rows from `first` on; returns all their logits [n, S, V]."""
        if self._apart and ids.shape[1] > 1 and len(ids) > 1:
            rows = range(len(ids))
            return np.concatenate(
                [self.step(ids[i : i + 1], positions[i : i + 1], first + i) for i in rows]
            )
        binding = self._session.io_binding()
        indices = np.tile(np.arange(ids.shape[1]), (len(ids), 1))
        for name, values in zip(STEP_INPUTS, (ids, positions, indices), strict=True):
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(values))
        for name, ring in self._caches.items():
            shared = ort.OrtValue.ortvalue_from_numpy(ring[first : first + len(ids)])
            binding.bind_ortvalue_input(name, shared)
            binding.bind_ortvalue_output(name.replace("past_", "present_"), shared)
        binding.bind_output("logits")
        self._session.run_with_iobinding(binding)
        found: Logits = binding.copy_outputs_to_cpu()[-1]
        return found


def check_numbers(
    model: ir.Model, build: Build, decoder: Decoder, batch: int, turns: Sequence[int]
) -> None:
    """Assert the PyTorch decoder's logits for a text in each of `batch` rows.

    Rows begin one after another, so that they stand at different slots, and then read `turns` of
    tokens together.
    """
    starts = [i * (i + 1) // 2 for i in range(batch)]  # 0, 1, 3 tokens that a row reads alone
    texts = [tiny.tokens(build.spec, sum(turns) + n, seed=i) for i, n in enumerate(starts)]
    got = list(_read(GraphSession(model, build, batch), build, texts, starts, turns))
    for row, text in enumerate(texts):
        expected = _expected(decoder, len(text), row)
        largest = np.abs(expected).max()
        assert largest > 1, "the comparison needs logits that are not close to zero"
        assert np.abs(got[row] - expected).max() <= TOLERANCE * largest, f"row {row}"


@cache
def _expected(decoder: Decoder, count: int, seed: int) -> Logits:
    """The decoder's logits [n, V] for the text that a row reads."""
    return tiny.at_once(decoder, tiny.tokens(decoder.spec, count, seed))


def _read(
    session: GraphSession, build: Build, texts: Sequence[Ids], starts: Sequence[int],
    turns: Sequence[int],
) -> Iterator[Logits]:  # fmt: skip
    """Logits [n, V] of each text."""
    found: list[list[Logits]] = [[] for _ in texts]
    at = [0] * len(texts)

    def run(rows: range, count: int) -> None:
        """Read `count` tokens in these rows, in as few steps as no ring's end interrupts."""
        while count > 0:
            step = min(_piece(build, at[row], count) for row in rows)
            where = np.array([np.arange(at[row], at[row] + step) for row in rows])
            ids = np.array([texts[row][at[row] : at[row] + step] for row in rows])
            for row, logits in zip(rows, session.step(ids, where, rows.start), strict=True):
                found[row].append(logits)
                at[row] += step
            count -= step

    for row, count in enumerate(starts):
        run(range(row, row + 1), count)
    for turn in turns:
        run(range(len(texts)), turn)
    return map(np.concatenate, found)


def _piece(build: Build, position: int, count: int) -> int:
    return next(
        window.pieces(position, count, build.ring.chunk, build.contract.capacities.values())
    )
