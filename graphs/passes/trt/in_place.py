"""Let TensorRT read the ring where it lies when it decodes one token.

TensorRT-RTX 1.7 has a kernel for one token and a fixed number of slots (`_gemv_mha_v1`) that reads
the updated caches in place, with fewer key heads than query heads. It takes that kernel only where
the sizes of single tokens and of prompts part: from the plain graph it copies the whole ring at
every token, on Mistral-7B's shapes 1.2 GB beside 3.9 GB of 4-bit weights. So for prompts the keys
and values of all tokens but the first follow once more behind the ring, where the mask hides them:

    keys    Concat(present_key [B, K, C, D], update[:, :, 1:] [B, K, S - 1, D])
    mask    Concat(mask [B, 1, S, C], false [B, 1, S, S - 1])

With one token there is nothing to append, and the operator reads `present_key` itself. The ring
holds every token already, so what is appended and hidden changes no result.
"""

from dataclasses import dataclass

import onnx_ir as ir

from graphs.passes.attention_nodes import nodes_with_windows
from graphs.passes.rule import PassError, constant, producer_of
from graphs.spec import ModelSpec

LAST = 2**63 - 1  # an end that a Slice never reaches
NEVER = "never"  # the name of the mask [B, 1, S, S - 1] of the appended tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class InPlace:
    """The pass. It fires once for each layer that has one of `windows`."""

    windows: tuple[int | None, ...]
    name: str = "in_place"

    def __call__(self, model: ir.Model, spec: ModelSpec) -> int:
        """Rewrite the layers. Raises PassError if one has another form."""
        graph = model.graph
        nodes = nodes_with_windows(graph, spec, self.windows, self.name)
        for node in nodes:
            for i in (1, 2):
                node.replace_input_with(i, _appended(graph, node, i))
            node.replace_input_with(3, _masked(graph, node, self.name))
        return len(nodes)


def _appended(graph: ir.Graph, node: ir.Node, index: int) -> ir.Value:
    """The cache with the updates of all tokens but the first behind it."""
    scatter = producer_of(node.inputs[index], "TensorScatter")
    if scatter is None:
        raise ValueError(f"{node.name} should read an updated cache")
    cache, update = scatter.outputs[0], scatter.inputs[1]
    rest = ir.node("Slice", [update, *_range(graph), _axis(graph, 2)])
    joined = ir.node("Concat", [cache, rest.outputs[0]], {"axis": 2})
    for value in (rest.outputs[0], joined.outputs[0]):
        value.type = cache.type
    if cache.shape is not None:
        rows, heads, _, size = cache.shape
        joined.outputs[0].shape = ir.Shape([rows, heads, None, size])
    graph.insert_before(node, [rest, joined])
    return joined.outputs[0]


def _masked(graph: ir.Graph, node: ir.Node, name: str) -> ir.Value:
    """The mask with columns of False behind it, computed once for all layers with this mask."""
    mask = node.inputs[3]
    source = None if mask is None else mask.producer()
    if mask is None or source is None:
        raise PassError(f"pass {name}: {node.name} has no mask that is computed in the graph")
    for reader in mask.consumers():
        if reader.op_type == "Concat" and reader.inputs[0] is mask:
            return reader.outputs[0]
    never = _never(graph)
    joined = ir.node("Concat", [mask, never], {"axis": 3})
    joined.outputs[0].type = mask.type
    graph.insert_after(source, joined)
    return joined.outputs[0]


def _never(graph: ir.Graph) -> ir.Value:
    """False [B, 1, S, S - 1]: positions are at least 0, which no builder knows."""
    for node in graph:
        if node.outputs[0].name == NEVER:
            return node.outputs[0]
    positions = next(value for value in graph.inputs if value.name == "position_ids")
    queries = ir.node("Unsqueeze", [positions, _constant(graph, "axes_1_3", [1, 3])])
    keys = ir.node("Unsqueeze", [positions, _constant(graph, "axes_1_2", [1, 2])])
    rest = ir.node("Slice", [keys.outputs[0], *_range(graph), _axis(graph, 3)])
    sums = ir.node("Add", [queries.outputs[0], rest.outputs[0]])
    zero = constant(graph, ir.tensor(0, ir.DataType.INT64, f"{NEVER}.least"))
    below = ir.node("Less", [sums.outputs[0], zero])
    below.outputs[0].name = NEVER
    below.outputs[0].type = ir.TensorType(ir.DataType.BOOL)
    graph.insert_before(next(iter(graph)), [queries, keys, rest, sums, below])
    return below.outputs[0]


def _range(graph: ir.Graph) -> tuple[ir.Value, ir.Value]:
    """From the second element to the end."""
    return _constant(graph, "second", [1]), _constant(graph, "end", [LAST])


def _axis(graph: ir.Graph, number: int) -> ir.Value:
    return _constant(graph, f"axis_{number}", [number])


def _constant(graph: ir.Graph, name: str, numbers: list[int]) -> ir.Value:
    return constant(graph, ir.tensor(numbers, ir.DataType.INT64, name))
