"""Find the attention of each layer in a graph. Rewrites nothing."""

from collections.abc import Collection, Mapping

import onnx_ir as ir

from graphs.passes.rule import PassError, producer_of
from graphs.spec import ModelSpec


def attention_nodes(graph: ir.Graph) -> Mapping[int, ir.Node]:
    """The `Attention` of each layer that has one, by the layer's number."""
    found = {}
    for node in graph:
        scatter = producer_of(node.inputs[1], "TensorScatter") if _attends(node) else None
        if scatter is not None:
            found[int(str(scatter.outputs[0].name).rpartition(".")[2])] = node  # present_key.0
    return found


def nodes_with_windows(
    graph: ir.Graph, spec: ModelSpec, windows: Collection[int | None], name: str
) -> list[ir.Node]:
    """The `Attention` of every layer with one of these windows.

    Raises PassError in the words of the pass `name` if a layer has none.
    """
    found = attention_nodes(graph)
    wanted = [i for i, window in enumerate(spec.layer_windows) if window in windows]
    missing = [i for i in wanted if i not in found]
    if missing:
        raise PassError(f"pass {name}: layer {missing[0]} has no Attention over its ring")
    return [found[i] for i in wanted]


def axis(value: ir.Value | None, index: int) -> int:
    """The size of a fixed axis; 0 if it is dynamic or unknown."""
    size = None if value is None or value.shape is None else value.shape[index]
    return size if isinstance(size, int) else 0


def _attends(node: ir.Node) -> bool:
    return node.op_type == "Attention" and len(node.inputs) > 1
