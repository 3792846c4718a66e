"""Fuse full attention into ONNX Runtime's `GroupQueryAttention`.

The operator takes the merged linear's q, k and v, rotates them, writes k and v into the cache in
place, and attends to the filled part of the cache instead of all that is allocated. It uses
positions as slots, which is right for a layer without a window: its ring never wraps. Layers with a
window keep the ring, because the operator's own windowed cache moves its contents. The angles
include the scale of the scores, as in `fold_attention_scale.py`.

    qkv ── Split ─┬─ Reshape ─ Transpose ─ RotaryEmbedding ───────────────────┐
                  ├─ Reshape ─ Transpose ─ RotaryEmbedding ─ TensorScatter ─ Attention ─ …
                  └─ Reshape ─ Transpose ─────────────────── TensorScatter ───┘
    qkv ── GroupQueryAttention ─ …
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from graphs.passes.rule import CONTRIB, PassError, constant, producer_of
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

    Angles are written into the graph for `positions` positions.
    """

    positions: int
    name: str = "group_query_attention"

    def __call__(self, model: ir.Model, spec: ModelSpec) -> int:
        """Rewrite every layer that has no window. Raises PassError if one has another form."""
        unwindowed = [i for i, window in enumerate(spec.layer_windows) if window is None]
        graph = model.graph
        found = dict(_pattern(graph))
        shared = _shared(graph, spec, self.positions)
        for layer in unwindowed:
            if layer not in found:
                raise PassError(f"pass {self.name}: layer {layer} has no attention over merged qkv")
            _rewrite(graph, found[layer], spec, shared)
        return len(unwindowed)


def rotation_scale(head_dim: int) -> float:
    """The factor D^-1/4 for queries and for keys, so that scores need no 1 / sqrt(D)."""
    return float(head_dim**-0.25)


def _shared(graph: ir.Graph, spec: ModelSpec, count: int) -> tuple[ir.Value, ...]:
    """Values that all layers read.

    The last position [B], the largest number of positions, cosines, sines, and positions [B, S].
    """
    positions = next(value for value in graph.inputs if value.name == "position_ids")
    frequencies = graph.initializers["inv_freq"].const_value
    if frequencies is None:
        raise ValueError("inv_freq should be a constant with numbers")
    places = np.arange(count, dtype=np.float32)
    angles = np.outer(places, frequencies.numpy())
    scale = np.float32(rotation_scale(spec.head_dim))
    caches = [
        constant(graph, ir.tensor(function(angles) * scale, name=f"rotary_{name}"))
        for name, function in (("cos", np.cos), ("sin", np.sin))
    ]
    end = constant(graph, ir.tensor(-1, ir.DataType.INT64, "last_position"))
    one = constant(graph, ir.tensor(1, ir.DataType.INT32, "one_position"))
    last = ir.node("Gather", [positions, end], {"axis": 1})
    narrow = ir.node("Cast", [last.outputs[0]], {"to": ir.DataType.INT32})
    most = ir.node("ReduceMax", [narrow.outputs[0]], {"keepdims": 0})
    total = ir.node("Add", [most.outputs[0], one])
    graph.insert_before(graph[0], [last, narrow, most, total])
    return narrow.outputs[0], total.outputs[0], *caches, positions


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


def _rewrite(graph: ir.Graph, found: Heads, spec: ModelSpec, shared: tuple[ir.Value, ...]) -> None:
    last, total, cos, sin, positions = shared
    key, value = found.scatters
    fused = ir.node(
        "GroupQueryAttention",
        [found.split.inputs[0], None, None, key.inputs[0], value.inputs[0], last, total, cos, sin,
         positions],
        {"num_heads": spec.num_attention_heads, "kv_num_heads": spec.num_key_value_heads,
         "do_rotary": 1, "scale": 1.0},
        num_outputs=3, domain=CONTRIB,
    )  # fmt: skip
    graph.insert_before(found.attention, fused)
    olds = (found.merged, key.outputs[0], value.outputs[0])
    for new, old in zip(fused.outputs, olds, strict=True):
        new.name, new.type, new.shape = old.name, old.type, old.shape
        old.name = f"{old.name}.before"
        old.replace_all_uses_with(new, replace_graph_outputs=True)
