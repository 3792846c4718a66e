"""Quantized linears and lookups in ONNX Runtime's own operators, for the `nbits` layout.

A weight with minimums takes two products, the second with the sums of the input's blocks:

    W = scale q + minimum    →    x W^T = MatMulNBits(x, q) + MatMul(ReduceSum(blocks of x), M^T)
"""

import onnx_ir as ir

from graphs.dtypes import Dtype
from graphs.passes.merge_linears import Linear
from graphs.passes.quantized_weights import Quantization, weight_parts
from graphs.passes.rule import CONTRIB, PassError, constant
from graphs.passes.weight_ref import WeightRef, weight_of
from graphs.quant_scheme import Scheme

ROUND_BLOCKS = {"accuracy_level": 4}
"""Rounds blocks of the input to int8: on the CPU the only level with a fast 8-bit kernel."""


def write_matmul_nbits(
    graph: ir.Graph, linear: Linear, scheme: Scheme, activation: Dtype, *, rounds_blocks: bool
) -> None:
    """Replace the product by `MatMulNBits`, and a product with the minimums if there are any."""
    matmul, weight = linear
    value, output = matmul.inputs[0], matmul.outputs[0]
    rows, columns = weight.sizes
    parts = weight_parts(graph, weight, scheme, activation, "nbits")
    minimum = parts.pop() if scheme.offset == "minimum" else None
    product = ir.node(
        "MatMulNBits", [value, *parts],
        {"K": columns, "N": rows, "bits": scheme.bits, "block_size": scheme.block or columns,
         **(ROUND_BLOCKS if rounds_blocks else {})},
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


def write_lookup(
    graph: ir.Graph, gather: ir.Node, quantization: Quantization, activation: Dtype
) -> None:
    """Look rows up in the codes of a tied embedding; only these rows are dequantized."""
    weight, output = weight_of(gather.inputs[0]), gather.outputs[0]
    if weight is None or quantization.layouts.get(weight.parts[0]) != "nbits":
        return
    scheme, (rows, columns) = quantization.schemes[weight.parts[0]], weight.sizes
    if scheme.block is None or columns % scheme.block or scheme.offset != "none":
        raise PassError(f"{weight.name}: an embedding lookup needs whole blocks and no offsets")
    _, scale = weight_parts(graph, weight, scheme, activation, "nbits")
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
