"""Fold the scale of attention scores into the rotation of queries and keys.

For a single query, ONNX Runtime has a kernel that is twice as fast as the one for several, but it
uses that kernel only if scores need no scaling afterwards. The scale is 1 / sqrt(D) = D^-1/4
D^-1/4: one factor goes into the rotated queries and one into the rotated keys. Scaling the cosines
and sines does both, with two small products for all layers:

    cos ─── RotaryEmbedding ─┐               cos ─ Mul ─ RotaryEmbedding ─┐
    (of q, and of k)         Attention   →   (of q, and of k)             Attention(scale=1)

The keys in the cache are then scaled too, which only the attention sees. `GroupQueryAttention` has
its angles as constants and scales those (`folds_scale`). Where only a part of each head is rotated,
or nothing, or queries are scaled after it, the operator scales the scores itself.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import onnx_ir as ir

from graphs.attention_form import HEAD_MULTIPLE
from graphs.passes.rule import Rule, constant, producer_of, shared
from graphs.spec import ModelSpec


class Rotated(NamedTuple):
    """An `Attention` and the rotary embeddings of its queries and keys."""

    attention: ir.Node
    query: ir.Node
    key: ir.Node


def _pattern(graph: ir.Graph) -> Iterator[Rotated]:
    for node in graph:
        if node.op_type != "Attention":
            continue
        scatter = producer_of(node.inputs[1], "TensorScatter")
        key = None if scatter is None else producer_of(scatter.inputs[1], "RotaryEmbedding")
        query = producer_of(node.inputs[0], "RotaryEmbedding")
        if query is not None and key is not None:
            yield Rotated(node, query, key)


def _check(found: Rotated) -> str | None:
    part = found.query.attributes.get("rotary_embedding_dim")
    if part is not None and part.as_int() != 0:  # 0 means all features
        return f"{found.attention.name} rotates a part of each head"
    if found.query.inputs[1:3] != found.key.inputs[1:3]:
        return f"{found.attention.name}: queries and keys are rotated by different angles"
    return None


def _rewrite(graph: ir.Graph, found: Rotated) -> None:
    own = found.attention.attributes.get("scale")
    scale = _head_dim(found.query) ** -0.25 if own is None else math.sqrt(own.as_float())
    found.attention.attributes["scale"] = ir.AttrFloat32("scale", 1.0)
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
    raise ValueError("the head size should be known from tracing")


def _scaled(graph: ir.Graph, angle: ir.Value, scale: float) -> ir.Value:
    """The product of `angle` and `scale`, computed once for all layers."""
    if angle.dtype is None:
        raise ValueError(f"{angle.name} has no type")
    if angle.producer() is None:
        raise ValueError(
            f"{angle.name} is an input of the graph; expected it to be computed in the graph"
        )
    factor = constant(graph, ir.tensor(scale, angle.dtype, "rotation_scale"))
    product = shared(graph, "Mul", [angle, factor])
    product.shape = angle.shape
    return product


def _expected(spec: ModelSpec) -> int:
    masked = [
        i for i, size in enumerate(spec.layer_windows)
        if size is not None or spec.head_dim % HEAD_MULTIPLE
    ]  # fmt: skip
    whole = spec.rotated_features == spec.head_dim and not spec.rope.query_scale
    return sum(spec.rotates(i) for i in masked) if whole else 0


FOLD_ATTENTION_SCALE = Rule(
    name="fold_attention_scale",
    pattern=_pattern,
    check=_check,
    rewrite=_rewrite,
    expected=_expected,
)
