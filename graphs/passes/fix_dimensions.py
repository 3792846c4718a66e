"""Letters made numbers: a graph for one size of something. Knows nothing about targets.

TensorRT updates a cache in place only if its capacity is fixed, so the ring's letter is replaced
by its capacity everywhere, and what was computed from it becomes a constant when it is folded.
"""

from collections.abc import Mapping

import onnx_ir as ir


def specialize(model: ir.Model, sizes: Mapping[str, int]) -> None:
    """Replace each letter in `sizes` by its number, in every shape of the graph, in place."""
    graph = model.graph
    values = [*graph.inputs, *graph.outputs, *(v for node in graph for v in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape(
                [d if isinstance(d, int) else sizes.get(str(d.value), d) for d in value.shape]
            )
