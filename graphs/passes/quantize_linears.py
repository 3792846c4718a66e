"""Replace the weights of quantized linears by codes and scales.

In the portable form a weight is `DequantizeLinear` of its codes, and an input that is rounded goes
through `QuantizeLinear` and `DequantizeLinear`. TensorRT compiles that to integer products:

    x ── MatMul(Transpose(W))    →    x ─ [Quantize ─ Dequantize] ─ MatMul(Transpose(Dequantize(q)))

`transposed` codes [K, N] need no Transpose; merged ones are joined along N at load time.

The `nbits` layout uses `MatMulNBits`, ONNX Runtime's kernel for quantized weights. A weight with
minimums takes two products, the second with the sums of the input's blocks:

    W = scale q + minimum    →    x W^T = MatMulNBits(x, q) + MatMul(ReduceSum(blocks of x), M^T)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from graphs.dtypes import Dtype
from graphs.passes.merge_linears import Linear, linear_at
from graphs.passes.rule import CONTRIB, PassError, constant
from graphs.passes.weight_ref import ONNX_DTYPE, WeightRef, weight_of
from graphs.quant_scheme import MINIMUM, SCALE, ZERO_POINT, Scheme, StoredPart, stored_parts
from graphs.spec import ModelSpec
from graphs.targets import CodeLayout

ACCURACY_LEVEL = 4  # round blocks of the input to int8: the only level with a fast 8-bit kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """Which linears of a model are quantized and how, by canonical weight name.

    `input_scales` has the static scale of every rounded input, by the weight that reads it.
    `layouts` has the layout of codes that is not `onnx`; `nbits` is for `MatMulNBits`.
    """

    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    input_scales: Mapping[str, float] = field(default_factory=dict)
    layouts: Mapping[str, CodeLayout] = field(default_factory=dict)


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
                _write_lookup(graph, node, self.quantization, self.activation)
            linear = linear_at(node)
            if linear is None or linear.weight.parts[0] not in schemes:
                continue
            parts = linear.weight.parts
            if len({schemes.get(part) for part in parts}) > 1:
                raise PassError(f"pass {self.name}: {', '.join(parts)} differ in their schemes")
            scheme = schemes[parts[0]]
            layout = self.quantization.layouts.get(parts[0], "onnx")
            if layout == "nbits":
                _write_nbits(graph, linear, scheme, self.activation)
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
        dequantize = ir.node("DequantizeLinear", [codes, scale], {"axis": 1})
        _typed(dequantize.outputs[0], activation, weight.sizes[::-1])
        graph.insert_before(matmul, dequantize)
        return dequantize.outputs[0]
    codes, scale, *_ = _parts(graph, weight, scheme, activation, layout)
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
    """Codes [K, N] of all parts side by side, and their scales [N]."""
    weight, (rows, columns) = linear.weight, linear.weight.sizes
    pieces = []
    for part, width in zip(weight.parts, widths, strict=True):
        codes, _ = stored_parts(part, (width, columns), scheme, activation, "transposed")
        pieces.append(_reference(graph, codes, (part,)))
    _, scales = stored_parts(str(weight.name), (rows, columns), scheme, activation, "transposed")
    scale = _reference(graph, scales, tuple(part + SCALE for part in weight.parts))
    if len(pieces) == 1:
        return pieces[0], scale
    join = ir.node("Concat", pieces, {"axis": 1})
    join.outputs[0].type, join.outputs[0].shape = pieces[0].type, ir.Shape((columns, rows))
    graph.insert_before(linear.matmul, join)
    return join.outputs[0], scale


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


def _write_nbits(graph: ir.Graph, linear: Linear, scheme: Scheme, activation: Dtype) -> None:
    """Replace the product by `MatMulNBits`, and a product with the minimums if there are any."""
    matmul, weight = linear
    value, output = matmul.inputs[0], matmul.outputs[0]
    rows, columns = weight.sizes
    parts = _parts(graph, weight, scheme, activation, "nbits")
    minimum = parts.pop() if scheme.offset == "minimum" else None
    product = ir.node(
        "MatMulNBits", [value, *parts],
        {"K": columns, "N": rows, "bits": scheme.bits, "block_size": scheme.block or columns,
         "accuracy_level": ACCURACY_LEVEL},
        domain=CONTRIB,
    )  # fmt: skip
    nodes, result = [product], product.outputs[0]
    if minimum is not None:
        sums = _block_sums(graph, matmul, value, columns, scheme)
        columnwise = ir.node("Transpose", [minimum], {"perm": [1, 0]})
        second = ir.node("MatMul", [sums, columnwise.outputs[0]])
        total = ir.node("Add", [result, second.outputs[0]])
        for part in (product, second):
            part.outputs[0].type, part.outputs[0].shape = output.type, output.shape
        nodes, result = [*nodes, columnwise, second, total], total.outputs[0]
    result.type, result.shape = output.type, output.shape
    graph.insert_before(matmul, nodes)
    result.name = output.name
    output.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(matmul, safe=True)


def _write_lookup(
    graph: ir.Graph, gather: ir.Node, quantization: Quantization, activation: Dtype
) -> None:
    """Look rows up in the codes of a tied embedding; only these rows are dequantized."""
    weight, output = weight_of(gather.inputs[0]), gather.outputs[0]
    if weight is None or quantization.layouts.get(weight.parts[0]) != "nbits":
        return
    scheme, (rows, columns) = quantization.schemes[weight.parts[0]], weight.sizes
    if scheme.block is None or columns % scheme.block or scheme.offset != "none":
        raise PassError(f"{weight.name}: an embedding lookup needs whole blocks and no offsets")
    _, scale = _parts(graph, weight, scheme, activation, "nbits")
    # The same bytes as the output layer's codes, without blocks in their shape.
    shape = (rows, columns * scheme.bits // 8)
    codes = WeightRef(f"{weight.name}.rows", weight.parts, shape, ir.DataType.UINT8)
    lookup = ir.node(
        "GatherBlockQuantized", [constant(graph, codes), gather.inputs[1], scale],
        {"bits": scheme.bits, "block_size": scheme.block, "gather_axis": 0, "quantize_axis": 1},
        domain=CONTRIB,
    )  # fmt: skip
    graph.insert_before(gather, lookup)
    result = lookup.outputs[0]
    result.type, result.shape, result.name = output.type, output.shape, output.name
    output.replace_all_uses_with(result)
    graph.remove(gather, safe=True)


def _block_sums(
    graph: ir.Graph, before: ir.Node, value: ir.Value | None, columns: int, scheme: Scheme
) -> ir.Value:
    """Sum each block of x [B, S, K]: [B, S, J]."""
    if value is None or scheme.block is None or columns % scheme.block:
        raise PassError(f"minimums need whole blocks; {columns} columns, blocks of {scheme.block}")
    blocks = [0, 0, columns // scheme.block, scheme.block]
    shape = constant(graph, ir.tensor(blocks, ir.DataType.INT64, f"blocks_{blocks[2]}"))
    axis = constant(graph, ir.tensor([-1], ir.DataType.INT64, "last_axis"))
    split = ir.node("Reshape", [value, shape])
    sums = ir.node("ReduceSum", [split.outputs[0], axis], {"keepdims": 0})
    graph.insert_before(before, [split, sums])
    return sums.outputs[0]


def _parts(
    graph: ir.Graph, weight: WeightRef, scheme: Scheme, activation: Dtype, layout: CodeLayout
) -> list[ir.Value]:
    """Add codes, scales and offsets to the graph, in the order of `stored_parts`."""
    found = []
    for part in stored_parts(str(weight.name), weight.sizes, scheme, activation, layout):
        suffix = part.name.removeprefix(str(weight.name))
        found.append(_reference(graph, part, tuple(name + suffix for name in weight.parts)))
    return found


def _reference(graph: ir.Graph, part: StoredPart, parts: tuple[str, ...]) -> ir.Value:
    # The unquantized weight keeps its name until it is removed, so the codes need another.
    name = part.name if part.name.endswith((SCALE, ZERO_POINT, MINIMUM)) else f"{part.name}.codes"
    return constant(graph, WeightRef(name, parts, part.shape, ONNX_DTYPE[part.element]))


def _typed(value: ir.Value, dtype: Dtype, sizes: tuple[int, ...]) -> None:
    value.type, value.shape = ir.TensorType(ONNX_DTYPE[dtype]), ir.Shape(sizes)
