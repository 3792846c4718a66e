"""Merge linears that read the same value: q, k and v; gate and up.

One wide matrix product keeps a CPU's cores busier than three narrow ones, and reads its input once.
The merged weight is the rows of its parts, one after another. That costs nothing, because the parts
are adjacent in the bundle's file.

    x ─┬─ MatMul(Transpose(q)) ─          x ── MatMul(Transpose(q+k+v)) ── Split ─┬─ q
       ├─ MatMul(Transpose(k)) ─    →                                             ├─ k
       └─ MatMul(Transpose(v)) ─                                                  └─ v
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import onnx_ir as ir

from graphs.passes.rule import Rule, constant
from graphs.passes.weight_ref import WeightRef, weight_of
from graphs.spec import ModelSpec


class Linear(NamedTuple):
    """`MatMul(x, Transpose(weight))`, weight [N, K]."""

    matmul: ir.Node
    weight: WeightRef


class Siblings(NamedTuple):
    """Linears that read one value, in the order in which their rows are stacked."""

    merged_name: str
    linears: list[Linear]


def linear_at(matmul: ir.Node) -> Linear | None:
    """The linear layer whose product is `matmul`; None if it is another kind of product."""
    if matmul.op_type != "MatMul" or matmul.inputs[1] is None:
        return None
    transpose = matmul.inputs[1].producer()
    if transpose is None or transpose.op_type != "Transpose":
        return None
    weight = weight_of(transpose.inputs[0])
    return None if weight is None else Linear(matmul, weight)


def _pattern(parts: tuple[str, ...], merged: str, graph: ir.Graph) -> Iterator[Siblings]:
    readers: dict[ir.Value, dict[str, Linear]] = defaultdict(dict)
    for node in graph:
        linear = linear_at(node)
        if linear is not None and node.inputs[0] is not None:
            suffix = linear.weight.parts[0].split(".")[-2]  # model.layers.0.self_attn.q_proj.weight
            readers[node.inputs[0]][suffix] = linear
    for linears in readers.values():
        if set(parts) <= set(linears):
            first = linears[parts[0]].weight.parts[0]
            name = first.replace(f".{parts[0]}.", f".{merged}.")
            yield Siblings(name, [linears[part] for part in parts])


def _check(siblings: Siblings) -> str | None:
    weights = [linear.weight for linear in siblings.linears]
    if len({weight.sizes[1] for weight in weights}) > 1:
        return f"{siblings.merged_name}: input sizes differ, {[w.sizes[1] for w in weights]}"
    if len({weight.dtype for weight in weights}) > 1:
        return f"{siblings.merged_name}: dtypes differ, {[str(w.dtype) for w in weights]}"
    return None


def _rewrite(graph: ir.Graph, siblings: Siblings) -> None:
    weights = [linear.weight for linear in siblings.linears]
    first = siblings.linears[0].matmul
    rows = [weight.sizes[0] for weight in weights]
    merged = WeightRef(
        siblings.merged_name,
        tuple(part for weight in weights for part in weight.parts),
        (sum(rows), weights[0].sizes[1]),
        weights[0].dtype,
    )
    sizes = ir.tensor(rows, ir.DataType.INT64, f"{siblings.merged_name}.rows")
    transpose = ir.node("Transpose", [constant(graph, merged)], {"perm": [1, 0]})
    matmul = ir.node("MatMul", [first.inputs[0], transpose.outputs[0]])
    split = ir.node(
        "Split", [matmul.outputs[0], constant(graph, sizes)], {"axis": -1}, num_outputs=len(rows)
    )
    graph.insert_before(first, [transpose, matmul, split])
    for linear, output in zip(siblings.linears, split.outputs, strict=True):
        old = linear.matmul.outputs[0]
        output.name, output.type, output.shape = old.name, old.type, old.shape
        old.replace_all_uses_with(output)
        graph.remove(linear.matmul, safe=True)


def _rule(name: str, parts: tuple[str, ...], merged: str) -> Rule[Siblings]:
    pattern: Callable[[ir.Graph], Iterator[Siblings]] = partial(_pattern, parts, merged)
    return Rule(
        name=name, pattern=pattern, check=_check, rewrite=_rewrite, expected=_once_per_layer
    )


def _once_per_layer(spec: ModelSpec) -> int:
    return spec.num_hidden_layers


MERGE_QKV = _rule("merge_qkv", ("q_proj", "k_proj", "v_proj"), "qkv_proj")
MERGE_GATE_UP = _rule("merge_gate_up", ("gate_proj", "up_proj"), "gate_up_proj")
