"""Merge linears that read the same value: q, k and v; gate and up.

One wide matrix product keeps a CPU's cores busier than three narrow ones, and reads its input once.
The merged weight is the rows of its parts, one after another. That costs nothing, because the parts
are adjacent in the bundle's file.

    x ─┬─ MatMul(Transpose(q)) ─          x ── MatMul(Transpose(q+k+v)) ── Split ─┬─ q
       ├─ MatMul(Transpose(k)) ─    →                                             ├─ k
       └─ MatMul(Transpose(v)) ─                                                  └─ v

Where the linears have biases, these are merged in the same way and added before the Split.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
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


class Bias(NamedTuple):
    """The addition of a bias [N] to the product of a linear."""

    add: ir.Node
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


def bias_of(linear: Linear) -> Bias | None:
    """The bias that is added to a product, and to nothing else; None if there is none."""
    readers = linear.matmul.outputs[0].consumers()
    if len(readers) != 1 or readers[0].op_type != "Add":
        return None
    weight = weight_of(readers[0].inputs[1])
    return None if weight is None else Bias(readers[0], weight)


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
    if len({bias_of(linear) is None for linear in siblings.linears}) > 1:
        return f"{siblings.merged_name}: some of its parts have biases and others have none"
    return None


def _rewrite(graph: ir.Graph, siblings: Siblings) -> None:
    weights = [linear.weight for linear in siblings.linears]
    first = siblings.linears[0].matmul
    biases = [bias for linear in siblings.linears if (bias := bias_of(linear)) is not None]
    rows = [weight.sizes[0] for weight in weights]
    merged = _merged(siblings.merged_name, weights)
    sizes = ir.tensor(rows, ir.DataType.INT64, f"{siblings.merged_name}.rows")
    transpose = ir.node("Transpose", [constant(graph, merged)], {"perm": [1, 0]})
    matmul = ir.node("MatMul", [first.inputs[0], transpose.outputs[0]])
    nodes, result = [transpose, matmul], matmul.outputs[0]
    if biases:
        name = siblings.merged_name.removesuffix(".weight") + ".bias"
        stacked = constant(graph, _merged(name, [one.weight for one in biases]))
        added = ir.node("Add", [result, stacked])
        matmul.outputs[0].type = first.outputs[0].type
        nodes, result = [*nodes, added], added.outputs[0]
    split = ir.node("Split", [result, constant(graph, sizes)], {"axis": -1}, num_outputs=len(rows))
    graph.insert_before(first, [*nodes, split])
    replaced = [one.add for one in biases] or [linear.matmul for linear in siblings.linears]
    for node, output in zip(replaced, split.outputs, strict=True):
        old = node.outputs[0]
        output.name, output.type, output.shape = old.name, old.type, old.shape
        old.replace_all_uses_with(output)
        graph.remove(node, safe=True)
    if biases:
        graph.remove([linear.matmul for linear in siblings.linears], safe=True)


def _merged(name: str, weights: Sequence[WeightRef]) -> WeightRef:
    """The rows of several weights or biases, one after another."""
    rows = sum(weight.sizes[0] for weight in weights)
    parts = tuple(part for weight in weights for part in weight.parts)
    return WeightRef(name, parts, (rows, *weights[0].sizes[1:]), weights[0].dtype)


def _rule(name: str, parts: tuple[str, ...], merged: str) -> Rule[Siblings]:
    pattern: Callable[[ir.Graph], Iterator[Siblings]] = partial(_pattern, parts, merged)
    return Rule(
        name=name, pattern=pattern, check=_check, rewrite=_rewrite, expected=_once_per_layer
    )


def _once_per_layer(spec: ModelSpec) -> int:
    return spec.num_hidden_layers


MERGE_QKV = _rule("merge_qkv", ("q_proj", "k_proj", "v_proj"), "qkv_proj")
MERGE_GATE_UP = _rule("merge_gate_up", ("gate_proj", "up_proj"), "gate_up_proj")
