"""Replace symbolic dimensions with fixed sizes.

TensorRT updates a cache in place only if its capacity is fixed. ONNX Runtime CUDA computes what
depends on a dynamic capacity on the CPU, and captures no graph that has a node there. Replacing the
ring's letter with its capacity lets everything computed from it be folded into constants.
"""

from collections.abc import Mapping

import onnx_ir as ir


def fix_dimensions(model: ir.Model, sizes: Mapping[str, int]) -> None:
    """Replace each letter of `sizes` by its size in every shape of the graph, in place."""
    graph = model.graph
    values = [*graph.inputs, *graph.outputs, *(v for node in graph for v in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape(
                [d if isinstance(d, int) else sizes.get(str(d.value), d) for d in value.shape]
            )
