"""The stored tensors of quantized weights as initializers of a graph."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from graphs.dtypes import Dtype
from graphs.passes.rule import constant
from graphs.passes.weight_ref import ONNX_DTYPE, WeightRef
from graphs.quant_scheme import MINIMUM, SCALE, ZERO_POINT, Scheme, StoredPart, stored_parts
from graphs.targets import CodeLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """Which linears of a model are quantized and how, by canonical weight name.

    `input_scales` has the static scale of every rounded input, by the weight that reads it.
    `layouts` has the layout of codes that is not `onnx`; `nbits` is for `MatMulNBits`, which with
    `rounds_blocks` rounds blocks of its input to int8.
    """

    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    input_scales: Mapping[str, float] = field(default_factory=dict)
    layouts: Mapping[str, CodeLayout] = field(default_factory=dict)
    rounds_blocks: bool = False


def weight_parts(
    graph: ir.Graph, weight: WeightRef, scheme: Scheme, activation: Dtype, layout: CodeLayout
) -> list[ir.Value]:
    """Add codes, scales and offsets to the graph, in the order of `stored_parts`."""
    found = []
    for part in stored_parts(str(weight.name), weight.sizes, scheme, activation, layout):
        suffix = part.name.removeprefix(str(weight.name))
        found.append(part_reference(graph, part, tuple(name + suffix for name in weight.parts)))
    return found


def part_reference(graph: ir.Graph, part: StoredPart, parts: tuple[str, ...]) -> ir.Value:
    """The initializer of one stored tensor, made of the rows of `parts`."""
    # The unquantized weight keeps its name until it is removed, so the codes need another.
    name = part.name if part.name.endswith((SCALE, ZERO_POINT, MINIMUM)) else f"{part.name}.codes"
    return constant(graph, WeightRef(name, parts, part.shape, ONNX_DTYPE[part.element]))
