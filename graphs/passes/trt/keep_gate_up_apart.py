"""Keep gate and up as separate MatMuls, so that SwiGLU is fused and no weight is copied.

TensorRT-RTX 1.7 joins products that read the same value. For gate and up this costs twice. While
building, the joined weights are a second copy: on Mistral-7B's shapes the builder's anonymous
memory is 1.66 times the weights, and 1.16 times with this pass. In the engine, SwiGLU becomes a
separate kernel over [B, S, 2 F], while a separate `up` product takes it as its epilogue.

    x ─┬─ gate ─ silu ─┐                 x ─┬─ gate ───────────── silu ─┐
       └─ up ───────── mul       →          └─ Mul(one) ─ up ────────── mul

`one` is computed from the positions, which are never negative, so it is always 1. The builder does
not know that and treats the two inputs as different. Multiplying by one changes no bit, and becomes
part of the kernel that writes x.
"""

from collections.abc import Iterator

import onnx_ir as ir

from graphs.passes.merge_linears import Linear, linear_at
from graphs.passes.rule import Rule, constant
from graphs.spec import ModelSpec

ONE = "one"


def _pattern(graph: ir.Graph) -> Iterator[Linear]:
    for node in graph:
        linear = linear_at(node)
        if linear is not None and linear.weight.parts[0].endswith(".mlp.up_proj.weight"):
            yield linear


def _check(linear: Linear) -> str | None:
    value = linear.matmul.inputs[0]
    if value is None or value.dtype is None:
        return f"{linear.weight.name}: the type of its input is not known"
    return None


def _rewrite(graph: ir.Graph, linear: Linear) -> None:
    value = linear.matmul.inputs[0]
    if value is None or value.dtype is None:
        raise ValueError("a product without an input should have failed the check")
    product = ir.node("Mul", [value, _one(graph, value.dtype)])
    product.outputs[0].shape, product.outputs[0].type = value.shape, value.type
    graph.insert_before(linear.matmul, product)
    linear.matmul.replace_input_with(0, product.outputs[0])


def _one(graph: ir.Graph, dtype: ir.DataType) -> ir.Value:
    """Return a scalar 1 that no builder can fold, computed once at the start of the graph."""
    for node in graph:
        if node.outputs[0].name == ONE:
            return node.outputs[0]
    positions = next(value for value in graph.inputs if value.name == "position_ids")
    least = constant(graph, ir.tensor(0, ir.DataType.INT64, f"{ONE}.least"))
    first = ir.node("ReduceMin", [positions], {"keepdims": 0})
    known = ir.node("GreaterOrEqual", [first.outputs[0], least])
    one = ir.node("Cast", [known.outputs[0]], {"to": dtype})
    one.outputs[0].name = ONE
    one.outputs[0].shape, one.outputs[0].type = ir.Shape([]), ir.TensorType(dtype)
    graph.insert_before(next(iter(graph)), [first, known, one])
    return one.outputs[0]


def _expected(spec: ModelSpec) -> int:
    return spec.num_hidden_layers


KEEP_GATE_UP_APART = Rule(
    name="keep_gate_up_apart", pattern=_pattern, check=_check, rewrite=_rewrite, expected=_expected
)
