"""Replace the weights of quantized linears by codes and scales.

In the portable form a weight is `DequantizeLinear` of its codes, and an input that is rounded goes
through `QuantizeLinear` and `DequantizeLinear`. TensorRT compiles that to integer products:

    x ── MatMul(Transpose(W))    →    x ─ [Quantize ─ Dequantize] ─ MatMul(Transpose(Dequantize(q)))

`transposed` codes [K, N] need no Transpose; merged ones are joined along N at load time.

The `nbits` layout is written by `onnxruntime/matmul_nbits.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphs.dtypes import Dtype
from graphs.passes.merge_linears import Linear, linear_at
from graphs.passes.onnxruntime.matmul_nbits import write_lookup, write_matmul_nbits
from graphs.passes.quantized_weights import Quantization, part_reference, weight_parts
from graphs.passes.rule import PassError, constant
from graphs.passes.weight_ref import ONNX_DTYPE
from graphs.quant_scheme import SCALE, Scheme, stored_parts
from graphs.spec import ModelSpec
from graphs.targets import CodeLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeLinears:
    """The pass. It fires once per quantized weight; each part of a merged weight counts once."""

    quantization: Quantization
    activation: Dtype
    name: str = "quantize_linears"

    def __call__(self, model: ir.Model, spec: ModelSpec) -> int:
        """Rewrite every quantized linear. Raises PassError unless all are found."""
        schemes, graph = self.quantization.schemes, model.graph
        shapes = spec.weight_shapes()
        done: set[str] = set()
        for node in list(graph):
            if node.op_type == "Gather":
                write_lookup(graph, node, self.quantization, self.activation)
            linear = linear_at(node)
            if linear is None or linear.weight.parts[0] not in schemes:
                continue
            parts = linear.weight.parts
            if len({schemes.get(part) for part in parts}) > 1:
                raise PassError(f"pass {self.name}: {', '.join(parts)} differ in their schemes")
            scheme = schemes[parts[0]]
            layout = self.quantization.layouts.get(parts[0], "onnx")
            if layout == "nbits":
                rounds = self.quantization.rounds_blocks
                write_matmul_nbits(graph, linear, scheme, self.activation, rounds_blocks=rounds)
            else:
                widths = [shapes[part][0] for part in parts]
                weight = _dequantized(graph, linear, scheme, self.activation, layout, widths)
                linear.matmul.replace_input_with(1, weight)
                scale = self.quantization.input_scales.get(parts[0])
                _round_input(graph, linear, scheme, self.activation, scale)
            done |= set(parts)
        missing = sorted(set(schemes) - done)
        if missing:
            raise PassError(f"pass {self.name}: no linear in the graph reads {missing[0]}")
        return len(done)


def _dequantized(
    graph: ir.Graph, linear: Linear, scheme: Scheme, activation: Dtype, layout: CodeLayout,
    widths: Sequence[int],
) -> ir.Value:  # fmt: skip
    """The dequantized weight [K, N] for its product; the parts have `widths` rows."""
    matmul, weight = linear
    if layout == "transposed":
        codes, scale = _transposed(graph, linear, scheme, activation, widths)
        where = {"axis": 1} if scheme.block is None else {"axis": 0, "block_size": scheme.block}
        dequantize = ir.node("DequantizeLinear", [codes, scale], where)
        _typed(dequantize.outputs[0], activation, weight.sizes[::-1])
        graph.insert_before(matmul, dequantize)
        return dequantize.outputs[0]
    codes, scale, *_ = weight_parts(graph, weight, scheme, activation, layout)
    where = {"axis": 0} if scheme.block is None else {"axis": 1, "block_size": scheme.block}
    dequantize = ir.node("DequantizeLinear", [codes, scale], where)
    transpose = ir.node("Transpose", [dequantize.outputs[0]], {"perm": [1, 0]})
    _typed(dequantize.outputs[0], activation, weight.sizes)
    _typed(transpose.outputs[0], activation, weight.sizes[::-1])
    graph.insert_before(matmul, [dequantize, transpose])
    return transpose.outputs[0]


def _transposed(
    graph: ir.Graph, linear: Linear, scheme: Scheme, activation: Dtype, widths: Sequence[int]
) -> tuple[ir.Value, ir.Value]:
    """Codes [K, N] and scales [N] or [J, N] of all parts side by side."""
    weight, (rows, columns) = linear.weight, linear.weight.sizes
    codes, scales = [], []
    for part, width in zip(weight.parts, widths, strict=True):
        stored = stored_parts(part, (width, columns), scheme, activation, "transposed")
        found = [part_reference(graph, one, (one.name,)) for one in stored]
        codes.append(found[0])
        scales.append(found[1])
    if scheme.block is None:  # the scales [N] of all parts are adjacent in the file
        _, all_scales = stored_parts(
            str(weight.name), (rows, columns), scheme, activation, "transposed"
        )
        scales = [part_reference(graph, all_scales, tuple(part + SCALE for part in weight.parts))]
    return _joined(graph, linear.matmul, codes), _joined(graph, linear.matmul, scales)


def _joined(graph: ir.Graph, before: ir.Node, values: Sequence[ir.Value]) -> ir.Value:
    """Constants [.., N] side by side; the backend joins them when it loads or builds the graph."""
    if len(values) == 1:
        return values[0]
    join = ir.node("Concat", values, {"axis": 1})
    sizes = [value.shape.numpy() for value in values if value.shape is not None]
    total = sum(columns for _, columns in sizes)
    join.outputs[0].type, join.outputs[0].shape = values[0].type, ir.Shape((sizes[0][0], total))
    graph.insert_before(before, join)
    return join.outputs[0]


def _round_input(
    graph: ir.Graph, linear: Linear, scheme: Scheme, activation: Dtype, scale: float | None
) -> None:
    """Round the input of the product if its scheme rounds inputs."""
    value = linear.matmul.inputs[0]
    if scheme.activation is None or value is None:
        return
    if scale is None:
        raise PassError(f"{linear.weight.name} has no scale for its input")
    rounded = _rounded(graph, linear.matmul, value, scheme, activation, scale)
    linear.matmul.replace_input_with(0, rounded)


def _rounded(
    graph: ir.Graph, before: ir.Node, value: ir.Value, scheme: Scheme, activation: Dtype,
    input_scale: float,
) -> ir.Value:  # fmt: skip
    """Quantize and dequantize `value`, once for all linears that read it with this scale."""
    name = f"{value.name}.scale_{input_scale!r}"
    shared = graph.initializers.get(name)
    if shared is not None:
        (quantize,) = shared.consumers()[:1]
        return quantize.outputs[0].consumers()[0].outputs[0]
    element = ONNX_DTYPE[str(scheme.activation)]
    scale = constant(graph, ir.tensor(input_scale, ONNX_DTYPE[activation], name))
    zero = constant(graph, ir.tensor(0, element, f"zero.{element}"))
    quantize = ir.node("QuantizeLinear", [value, scale, zero])
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero])
    quantize.outputs[0].type, quantize.outputs[0].shape = ir.TensorType(element), value.shape
    dequantize.outputs[0].type, dequantize.outputs[0].shape = value.type, value.shape
    graph.insert_before(before, [quantize, dequantize])
    return dequantize.outputs[0]


def _typed(value: ir.Value, dtype: Dtype, sizes: tuple[int, ...]) -> None:
    value.type, value.shape = ir.TensorType(ONNX_DTYPE[dtype]), ir.Shape(sizes)
