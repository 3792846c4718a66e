"""Fold each group of query heads into query rows, so that keys are not repeated.

If there are fewer key/value heads than query heads, TensorRT-RTX 1.7 repeats keys and values for
every query head: at every token, in every layer, it reads the whole ring and writes it out H/K
times wider. For Mistral-7B's ring of 4,608 slots that is 2.4 GB written and read again per token,
beside 14.5 GB of weights, which cancels the benefit of grouped queries. Of the H = G K query heads,
the G heads of group k attend to key head k, so the result is the same with

    query [B, H, S, D]  seen as  [B, K, G S, D]          (no data moves: a reshape)
    mask  [B, 1, S, C]  stacked G times, once for all layers, to [B, 1, G S, C]

and an `Attention` that has as many query heads as key heads.
"""

from collections.abc import Iterator
from typing import NamedTuple

import onnx_ir as ir

from graphs.passes.rule import Rule, constant, shared
from graphs.spec import ModelSpec


class Grouped(NamedTuple):
    """An `Attention` node, its head counts and its mask."""

    node: ir.Node
    heads: int
    kv_heads: int
    mask: ir.Value


def _pattern(graph: ir.Graph) -> Iterator[Grouped]:
    for node in graph:
        if node.op_type == "Attention":
            query, key, _, mask = node.inputs
            if query is not None and key is not None and mask is not None:
                yield Grouped(node, _axis(query, 1), _axis(key, 1), mask)


def _axis(value: ir.Value, axis: int) -> int:
    size = None if value.shape is None else value.shape[axis]
    return size if isinstance(size, int) else 0


def _check(found: Grouped) -> str | None:
    if found.kv_heads < 1 or found.heads % found.kv_heads:
        return f"{found.node.name}: {found.heads} query heads, {found.kv_heads} key heads"
    if found.heads == found.kv_heads:
        return f"{found.node.name}: every query head has its own key head"
    return None


def _rewrite(graph: ir.Graph, found: Grouped) -> None:
    node, groups = found.node, found.heads // found.kv_heads
    query, output = node.inputs[0], node.outputs[0]
    folded = _reshape(graph, query, found.kv_heads)
    graph.insert_before(node, folded)
    node.replace_input_with(0, folded.outputs[0])
    node.replace_input_with(3, _stacked(graph, found.mask, groups))
    unfolded = _reshape(graph, output, found.heads)
    graph.insert_after(node, unfolded)
    output.replace_all_uses_with(unfolded.outputs[0])
    unfolded.replace_input_with(0, output)
    unfolded.outputs[0].shape, unfolded.outputs[0].type = output.shape, output.type
    output.shape = None


def _reshape(graph: ir.Graph, value: ir.Value | None, heads: int) -> ir.Node:
    """[B, *, *, D] to [B, heads, inferred, D]."""
    # Only one axis may be inferred: the number of rows. So D is given.
    size = 0 if value is None else _axis(value, 3)
    shape = ir.tensor([0, heads, -1, size], ir.DataType.INT64, f"heads_{heads}")
    return ir.node("Reshape", [value, constant(graph, shape)])


def _stacked(graph: ir.Graph, mask: ir.Value, groups: int) -> ir.Value:
    """The mask repeated `groups` times along its rows, computed once for all layers."""
    if mask.producer() is None:
        raise ValueError(
            "the mask is an input of the graph; expected it to be computed in the graph"
        )
    return shared(graph, "Concat", [mask] * groups, {"axis": 2})


def _expected(spec: ModelSpec) -> int:
    grouped = spec.num_attention_heads != spec.num_key_value_heads
    return spec.num_hidden_layers if grouped else 0


FOLD_QUERY_GROUPS = Rule(
    name="fold_query_groups", pattern=_pattern, check=_check, rewrite=_rewrite, expected=_expected
)
