"""Attention without a window as ONNX Runtime's `GroupQueryAttention`: one operator for seven kinds.

It takes q, k and v as the merged linear gives them, turns them by their positions, writes k and v
into the cache in place and attends to what is filled, not to what is allocated. Positions are slots
there, which is so where a layer has no window: its ring never wraps. Layers with a window keep
the ring, since the operator's own windowed cache moves its contents. Angles carry the scale of the
scores, as in `scale_rotation.py`.

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

from graphs.passes.rule import CONTRIB, PassError, constant, maker
from graphs.spec import ModelSpec

HEAD_MULTIPLE = 16  # what the operator wants heads' sizes to be, where it turns them


class Heads(NamedTuple):
    """One layer's attention, from the merged linear's output to the merged heads."""

    attention: ir.Node
    scatters: tuple[ir.Node, ir.Node]  # of keys and of values
    split: ir.Node
    merged: ir.Value  # [B, S, H * D]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupQueryAttention:
    """The pass. It fires once for each layer without a window, if heads have a size that it takes.

    Angles are written into the graph for as many positions as the model's spec allows.
    """

    name: str = "group_query_attention"

    def __call__(self, model: ir.Model, spec: ModelSpec) -> int:
        """Rewrite every layer that has no window. Raises PassError where one is not as expected."""
        unwindowed = [i for i, window in enumerate(spec.layer_windows) if window is None]
        if not unwindowed or spec.head_dim % HEAD_MULTIPLE:
            return 0
        graph = model.graph
        found = dict(_pattern(graph))
        shared = _shared(graph, spec)
        for layer in unwindowed:
            if layer not in found:
                raise PassError(f"pass {self.name}: layer {layer} has no attention over merged qkv")
            _rewrite(graph, found[layer], spec, shared)
        return len(unwindowed)


def rotation_scale(head_dim: int) -> float:
    """What queries and keys are multiplied with, each, for scores that need no 1 / sqrt(D)."""
    return float(head_dim**-0.25)


def _shared(graph: ir.Graph, spec: ModelSpec) -> tuple[ir.Value, ...]:
    """What all layers read: last position [B], their number, angles, positions [B, S]."""
    positions = next(value for value in graph.inputs if value.name == "position_ids")
    frequencies = graph.initializers["inv_freq"].const_value
    if frequencies is None:
        raise ValueError("inv_freq is a constant with numbers in it")
    places = np.arange(spec.max_position_embeddings, dtype=np.float32)
    angles = np.outer(places, frequencies.numpy())
    scale = np.float32(rotation_scale(spec.head_dim))
    caches = [
        constant(graph, ir.tensor(turn(angles) * scale, name=f"rotary_{name}"))
        for name, turn in (("cos", np.cos), ("sin", np.sin))
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
        key, value = (maker(node.inputs[i], "TensorScatter") for i in (1, 2))
        rotary = maker(node.inputs[0], "RotaryEmbedding")
        if key is None or value is None or rotary is None:
            continue
        split = _split(rotary.inputs[0])
        turned = maker(key.inputs[1], "RotaryEmbedding")
        if split is None or turned is None or _split(turned.inputs[0]) is not split:
            continue
        if _split(value.inputs[1]) is split:
            merged = node.outputs[0].consumers()[0].outputs[0].consumers()[0].outputs[0]
            layer = int(str(key.outputs[0].name).rpartition(".")[2])  # present_key.0
            yield layer, Heads(node, (key, value), split, merged)


def _split(value: ir.Value | None) -> ir.Node | None:
    """The `Split` that a value with heads [B, heads, S, D] comes from."""
    transpose = maker(value, "Transpose")
    reshape = None if transpose is None else maker(transpose.inputs[0], "Reshape")
    return None if reshape is None else maker(reshape.inputs[0], "Split")


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


GROUP_QUERY_ATTENTION = GroupQueryAttention()
