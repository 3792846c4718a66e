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

A layer that does more to queries and keys than rotate whole heads (norms, a rotated part, a scale
by position) does that before the operator, which then takes q, k and v one by one.
"""

import math
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
    split: ir.Node | None  # the one that queries, keys and values come from unchanged
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
        found = dict(_pattern(graph, spec))
        rotary: tuple[ir.Value, ...] = ()
        if any(map(spec.only_rotates, unwindowed)):
            positions = next(value for value in graph.inputs if value.name == "position_ids")
            rotary = (*self._angles(graph, spec), positions)
        shared = self._shared(graph)
        for layer in unwindowed:
            rotates = spec.only_rotates(layer)
            if layer not in found or (rotates and found[layer].split is None):
                raise PassError(f"pass {self.name}: layer {layer} has no attention over merged qkv")
            inputs = (*shared, *(rotary if rotates else ()))
            _rewrite(graph, found[layer], self._attributes(spec, rotates=rotates), inputs)
        return len(unwindowed)

    def _attributes(self, spec: ModelSpec, *, rotates: bool) -> Mapping[str, int | float]:
        scale, softcap = spec.attention.scale, spec.attention.softcap
        found: dict[str, int | float] = {
            "num_heads": spec.num_attention_heads, "kv_num_heads": spec.num_key_value_heads,
            "do_rotary": int(rotates),
        }  # fmt: skip
        if rotates and self.folds_scale:
            found["scale"] = 1.0
        elif scale is not None:  # the operator's own is 1 / sqrt(D)
            found["scale"] = scale
        return found if softcap is None else {**found, "softcap": softcap}

    def _shared(self, graph: ir.Graph) -> tuple[ir.Value, ...]:
        """Values that all layers read: the last position [B], and the number of positions."""
        positions = next(value for value in graph.inputs if value.name == "position_ids")
        end = constant(graph, ir.tensor(-1, ir.DataType.INT64, "last_position"))
        last = ir.node("Gather", [positions, end], {"axis": 1})
        narrow = ir.node("Cast", [last.outputs[0]], {"to": ir.DataType.INT32})
        total, nodes = _total(graph, narrow.outputs[0], self.total)
        graph.insert_before(graph[0], [last, narrow, *nodes])
        return narrow.outputs[0], total

    def _angles(self, graph: ir.Graph, spec: ModelSpec) -> list[ir.Value]:
        """Cosines and sines, [positions, D/2] each."""
        frequencies = graph.initializers["inv_freq"].const_value
        if frequencies is None:
            raise ValueError("inv_freq should be a constant with numbers")
        places = np.arange(self.positions, dtype=np.float32)
        angles = np.outer(places, frequencies.numpy())
        factor = 1.0 if spec.rope_scaling is None else spec.rope_scaling.attention_factor
        scale = np.float32(factor * (rotation_scale(spec) if self.folds_scale else 1))
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


def rotation_scale(spec: ModelSpec) -> float:
    """The factor D^-1/4 for queries and for keys, so that scores need no 1 / sqrt(D)."""
    scale = spec.attention.scale
    return float(spec.head_dim**-0.25) if scale is None else math.sqrt(scale)


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


def _pattern(graph: ir.Graph, spec: ModelSpec) -> Iterator[tuple[int, Heads]]:
    for node in graph:
        if node.op_type != "Attention":
            continue
        key, value = (producer_of(node.inputs[i], "TensorScatter") for i in (1, 2))
        if key is None or value is None:
            continue
        layer = int(str(key.outputs[0].name).rpartition(".")[2])  # present_key.0
        merged = node.outputs[0].consumers()[0].outputs[0].consumers()[0].outputs[0]
        split = _common_split(node.inputs[0], key.inputs[1], value.inputs[1], spec, layer)
        yield layer, Heads(node, (key, value), split, merged)


def _common_split(
    query: ir.Value | None,
    key: ir.Value | None,
    value: ir.Value | None,
    spec: ModelSpec,
    layer: int,
) -> ir.Node | None:
    """The `Split` of the merged linear, if all three come from it as the operator expects them."""
    if spec.only_rotates(layer):
        rotations = [producer_of(one, "RotaryEmbedding") for one in (query, key)]
        query, key = (None if node is None else node.inputs[0] for node in rotations)
    splits = [_split(one) for one in (query, key, value)]
    return splits[0] if splits[0] is splits[1] is splits[2] else None


def _split(value: ir.Value | None) -> ir.Node | None:
    """The `Split` that a value with heads [B, heads, S, D] comes from."""
    transpose = producer_of(value, "Transpose")
    reshape = None if transpose is None else producer_of(transpose.inputs[0], "Reshape")
    return None if reshape is None else producer_of(reshape.inputs[0], "Split")


def _rewrite(
    graph: ir.Graph, found: Heads, attributes: Mapping[str, int | float],
    shared: tuple[ir.Value, ...],
) -> None:  # fmt: skip
    key, value = found.scatters
    given: list[ir.Value | None]
    if found.split is None:
        before = (found.attention.inputs[0], key.inputs[1], value.inputs[1])
        given = [_merged_heads(graph, found.attention, one) for one in before]
    else:
        given = [found.split.inputs[0], None, None]
    fused = ir.node(
        "GroupQueryAttention", [*given, key.inputs[0], value.inputs[0], *shared],
        attributes, num_outputs=3, domain=CONTRIB,
    )  # fmt: skip
    graph.insert_before(found.attention, fused)
    olds = (found.merged, key.outputs[0], value.outputs[0])
    for new, old in zip(fused.outputs, olds, strict=True):
        new.name, new.type, new.shape = old.name, old.type, old.shape
        old.name = f"{old.name}.before"
        old.replace_all_uses_with(new, replace_graph_outputs=True)


def _merged_heads(graph: ir.Graph, before: ir.Node, value: ir.Value | None) -> ir.Value:
    """The heads [B, heads, S, D] as the operator takes them, [B, S, heads * D]."""
    transpose = producer_of(value, "Transpose")
    reshape = None if transpose is None else producer_of(transpose.inputs[0], "Reshape")
    if reshape is not None and reshape.inputs[0] is not None:
        return reshape.inputs[0]  # they were split, and nothing happened to them
    shape = constant(graph, ir.tensor([0, 0, -1], ir.DataType.INT64, "merged_heads"))
    turned = ir.node("Transpose", [value], {"perm": [0, 2, 1, 3]})
    merged = ir.node("Reshape", [turned.outputs[0], shape])
    graph.insert_before(before, [turned, merged])
    if value is not None:
        turned.outputs[0].type = merged.outputs[0].type = value.type
    return merged.outputs[0]
