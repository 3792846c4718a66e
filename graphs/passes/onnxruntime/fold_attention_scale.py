"""Attention's scale goes into the rotation of queries and keys. Knows nothing about weights.

ONNX Runtime multiplies one query with all keys by a kernel that is twice as fast as the one for
several, but only where the product needs no scaling afterwards. Of the 1 / sqrt(D) that scores are
scaled by, D^-1/4 is in the queries and as much in the keys once cosines and sines have it, for
which two small products serve all layers:

    cos ─── RotaryEmbedding ─┐               cos ─ Mul ─ RotaryEmbedding ─┐
    (of q, and of k)         Attention   →   (of q, and of k)             Attention(scale=1)

Keys then lie in the cache scaled, which only the attention sees. `GroupQueryAttention` does the
same with the angles that it has as constants.
"""

from collections.abc import Iterator
from typing import NamedTuple

import onnx_ir as ir

from graphs.passes.onnxruntime.group_query_attention import HEAD_MULTIPLE, rotation_scale
from graphs.passes.rule import Rule, constant, maker, shared
from graphs.spec import ModelSpec


class Turned(NamedTuple):
    """An `Attention` and the rotations of its queries and keys."""

    attention: ir.Node
    query: ir.Node
    key: ir.Node


def _pattern(graph: ir.Graph) -> Iterator[Turned]:
    for node in graph:
        if node.op_type != "Attention":
            continue
        scatter = maker(node.inputs[1], "TensorScatter")
        key = None if scatter is None else maker(scatter.inputs[1], "RotaryEmbedding")
        query = maker(node.inputs[0], "RotaryEmbedding")
        if query is not None and key is not None:
            yield Turned(node, query, key)


def _check(found: Turned) -> str | None:
    if "scale" in found.attention.attributes:
        return f"{found.attention.name} has a scale of its own"
    if found.query.inputs[1:3] != found.key.inputs[1:3]:
        return f"{found.attention.name}: queries and keys are turned by other angles"
    return None


def _rewrite(graph: ir.Graph, found: Turned) -> None:
    found.attention.attributes["scale"] = ir.AttrFloat32("scale", 1.0)
    scale = rotation_scale(_head_dim(found.query))
    for index in (1, 2):
        angle = found.query.inputs[index]
        if angle is None:
            raise ValueError("a rotation reads cosines and sines")
        scaled = _scaled(graph, angle, scale)
        found.query.replace_input_with(index, scaled)
        found.key.replace_input_with(index, scaled)


def _head_dim(rotation: ir.Node) -> int:
    heads = rotation.inputs[0]  # [B, heads, S, D]
    shape = None if heads is None else heads.shape
    match None if shape is None else shape[-1]:
        case int(size):
            return size
    raise ValueError("the size of a head is known where the graph was traced")


def _scaled(graph: ir.Graph, angle: ir.Value, scale: float) -> ir.Value:
    """The product of `angle` and `scale`; made once and shared by all layers."""
    if angle.dtype is None:
        raise ValueError(f"{angle.name} has no type")
    if angle.producer() is None:
        raise ValueError(f"{angle.name} is an input of the graph; it should be computed in it")
    factor = constant(graph, ir.tensor(scale, angle.dtype, "rotation_scale"))
    product = shared(graph, "Mul", [angle, factor])
    product.shape = angle.shape
    return product


def _expected(spec: ModelSpec) -> int:
    if spec.head_dim % HEAD_MULTIPLE:
        return spec.num_hidden_layers
    return sum(size is not None for size in spec.layer_windows)


SCALE_ROTATION = Rule(
    name="scale_rotation", pattern=_pattern, check=_check, rewrite=_rewrite, expected=_expected
)
