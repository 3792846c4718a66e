"""Fuse full attention into ONNX Runtime's `GroupQueryAttention`.

The operator takes the merged linear's q, k and v, rotates them, writes k and v into the cache in
place, and attends to the filled part of the cache instead of all that is allocated. It uses
positions as slots, which is right for a layer without a window: its ring never wraps. Layers with a
window keep the ring, because the operator's own windowed cache moves its contents.

On CUDA, the operator reads the total number of positions on the CPU. Computed from the positions it
would be copied there at every step, and the step could not be captured as a CUDA graph. There the
total is the capacity of the ring, a constant; what limits each row is its own last position.

    qkv ── Split ─┬─ Reshape ─ Transpose ─ RotaryEmbedding ───────────────────┐
                  ├─ Reshape ─ Transpose ─ RotaryEmbedding ─ TensorScatter ─ Attention ─ …
                  └─ Reshape ─ Transpose ─────────────────── TensorScatter ───┘
    qkv ── GroupQueryAttention ─ …
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from graphs.dtypes import Dtype
from graphs.passes.rule import CONTRIB, PassError, constant, producer_of
from graphs.passes.weight_ref import ONNX_DTYPE
from graphs.spec import ModelSpec


class Heads(NamedTuple):
    """The attention of one layer, from the output of the merged linear to the merged heads."""

    attention: ir.Node
    scatters: tuple[ir.Node, ir.Node]  # of keys and of values
    split: ir.Node
    merged: ir.Value  # [B, S, H * D]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupQueryAttention:
    """The pass. It fires once for each layer without a window.

    Angles for `positions` positions are written into the graph, of the type `activation`. `total`
    is the operator's number of positions if it is a constant; None computes it in every step. With
    `folds_scale`, the angles include the scale of the scores, as in `fold_attention_scale.py`.
    """

    positions: int
    total: int | None
    activation: Dtype
    folds_scale: bool
    name: str = "group_query_attention"

    def __call__(self, model: ir.Model, spec: ModelSpec) -> int:
        """Rewrite every layer that has no window. Raises PassError if one has another form."""
        unwindowed = [i for i, window in enumerate(spec.layer_windows) if window is None]
        graph = model.graph
        found = dict(_pattern(graph))
        shared = self._shared(graph, spec)
        for layer in unwindowed:
            if layer not in found:
                raise PassError(f"pass {self.name}: layer {layer} has no attention over merged qkv")
            _rewrite(graph, found[layer], self._attributes(spec), shared)
        return len(unwindowed)

    def _attributes(self, spec: ModelSpec) -> Mapping[str, int | float]:
        heads = {"num_heads": spec.num_attention_heads, "kv_num_heads": spec.num_key_value_heads}
        scale = {"scale": 1.0} if self.folds_scale else {}  # the operator's own is 1 / sqrt(D)
        return {**heads, "do_rotary": 1, **scale}

    def _shared(self, graph: ir.Graph, spec: ModelSpec) -> tuple[ir.Value, ...]:
        """Values that all layers read.

        The last position [B], the number of positions, cosines, sines, and positions [B, S].
        """
        positions = next(value for value in graph.inputs if value.name == "position_ids")
        angles = self._angles(graph, spec)
        end = constant(graph, ir.tensor(-1, ir.DataType.INT64, "last_position"))
        last = ir.node("Gather", [positions, end], {"axis": 1})
        narrow = ir.node("Cast", [last.outputs[0]], {"to": ir.DataType.INT32})
        total, nodes = _total(graph, narrow.outputs[0], self.total)
        graph.insert_before(graph[0], [last, narrow, *nodes])
        return narrow.outputs[0], total, *angles, positions

    def _angles(self, graph: ir.Graph, spec: ModelSpec) -> list[ir.Value]:
        """Cosines and sines, [positions, D/2] each."""
        frequencies = graph.initializers["inv_freq"].const_value
        if frequencies is None:
            raise ValueError("inv_freq should be a constant with numbers")
        places = np.arange(self.positions, dtype=np.float32)
        angles = np.outer(places, frequencies.numpy())
        scale = np.float32(rotation_scale(spec.head_dim) if self.folds_scale else 1)
        dtype = ONNX_DTYPE[self.activation]
        return [
            constant(
                graph,
                ir.Tensor(
                    (function(angles) * scale).astype(dtype.numpy()), dtype=dtype,
                    name=f"rotary_{name}",
                ),
            )
            for name, function in (("cos", np.cos), ("sin", np.sin))
        ]  # fmt: skip


def rotation_scale(head_dim: int) -> float:
    """The factor D^-1/4 for queries and for keys, so that scores need no 1 / sqrt(D)."""
    return float(head_dim**-0.25)


def _total(
    graph: ir.Graph, last: ir.Value, known: int | None
) -> tuple[ir.Value, Sequence[ir.Node]]:
    """The largest number of positions in any row, and the nodes that compute it, if any."""
    if known is not None:
        return constant(graph, ir.tensor(known, ir.DataType.INT32, "total_positions")), ()
    one = constant(graph, ir.tensor(1, ir.DataType.INT32, "one_position"))
    most = ir.node("ReduceMax", [last], {"keepdims": 0})
    total = ir.node("Add", [most.outputs[0], one])
    return total.outputs[0], (most, total)


def _pattern(graph: ir.Graph) -> Iterator[tuple[int, Heads]]:
    for node in graph:
        if node.op_type != "Attention":
            continue
        key, value = (producer_of(node.inputs[i], "TensorScatter") for i in (1, 2))
        rotary = producer_of(node.inputs[0], "RotaryEmbedding")
        if key is None or value is None or rotary is None:
            continue
        split = _split(rotary.inputs[0])
        rotated = producer_of(key.inputs[1], "RotaryEmbedding")
        if split is None or rotated is None or _split(rotated.inputs[0]) is not split:
            continue
        if _split(value.inputs[1]) is split:
            merged = node.outputs[0].consumers()[0].outputs[0].consumers()[0].outputs[0]
            layer = int(str(key.outputs[0].name).rpartition(".")[2])  # present_key.0
            yield layer, Heads(node, (key, value), split, merged)


def _split(value: ir.Value | None) -> ir.Node | None:
    """The `Split` that a value with heads [B, heads, S, D] comes from."""
    transpose = producer_of(value, "Transpose")
    reshape = None if transpose is None else producer_of(transpose.inputs[0], "Reshape")
    return None if reshape is None else producer_of(reshape.inputs[0], "Split")


def _rewrite(
    graph: ir.Graph, found: Heads, attributes: Mapping[str, int | float],
    shared: tuple[ir.Value, ...],
) -> None:  # fmt: skip
    last, total, cos, sin, positions = shared
    key, value = found.scatters
    fused = ir.node(
        "GroupQueryAttention",
        [found.split.inputs[0], None, None, key.inputs[0], value.inputs[0], last, total, cos, sin,
         positions],
        attributes, num_outputs=3, domain=CONTRIB,
    )  # fmt: skip
    graph.insert_before(found.attention, fused)
    olds = (found.merged, key.outputs[0], value.outputs[0])
    for new, old in zip(fused.outputs, olds, strict=True):
        new.name, new.type, new.shape = old.name, old.type, old.shape
        old.name = f"{old.name}.before"
        old.replace_all_uses_with(new, replace_graph_outputs=True)
