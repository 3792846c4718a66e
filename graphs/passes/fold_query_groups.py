"""Fold each group of query heads into query rows, so that keys are not repeated.

If there are fewer key/value heads than query heads, a backend may repeat keys and values for every
query head: at every token, in every layer, it reads the whole ring and writes it out H/K times
wider. For Mistral-7B's ring of 4,608 slots that is 2.4 GB written and read again per token, beside
14.5 GB of weights, which cancels the benefit of grouped queries. Of the H = G K query heads, the G
heads of group k attend to key head k, so the result is the same with

    query [B, H, S, D]  seen as  [B, K, G S, D]          (no data moves: a reshape)
    mask  [B, 1, S, C]  stacked G times, once for all layers, to [B, 1, G S, C]

and an `Attention` that has as many query heads as key heads.
"""

from dataclasses import dataclass

import onnx_ir as ir

from graphs.passes.attention_nodes import axis, nodes_with_windows
from graphs.passes.rule import PassError, constant, shared
from graphs.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldQueryGroups:
    """The pass. It fires once for each layer that has one of `windows`."""

    windows: tuple[int | None, ...]
    name: str = "fold_query_groups"

    def __call__(self, model: ir.Model, spec: ModelSpec) -> int:
        """Rewrite the layers. Raises PassError if one has another form."""
        nodes = nodes_with_windows(model.graph, spec, self.windows, self.name)
        for node in nodes:
            self._rewrite(model.graph, node)
        return len(nodes)

    def _rewrite(self, graph: ir.Graph, node: ir.Node) -> None:
        query, output, mask = node.inputs[0], node.outputs[0], node.inputs[3]
        heads, kv_heads = axis(query, 1), axis(node.inputs[1], 1)
        if mask is None or kv_heads < 1 or heads % kv_heads or heads == kv_heads:
            raise PassError(
                f"pass {self.name}: {node.name} has {heads} query heads and {kv_heads} key heads"
            )
        folded = _reshape(graph, query, kv_heads)
        graph.insert_before(node, folded)
        node.replace_input_with(0, folded.outputs[0])
        node.replace_input_with(3, _stacked(graph, mask, heads // kv_heads))
        unfolded = _reshape(graph, output, heads)
        graph.insert_after(node, unfolded)
        output.replace_all_uses_with(unfolded.outputs[0])
        unfolded.replace_input_with(0, output)
        unfolded.outputs[0].shape, unfolded.outputs[0].type = output.shape, output.type
        output.shape = None


def _reshape(graph: ir.Graph, value: ir.Value | None, heads: int) -> ir.Node:
    """[B, *, *, D] to [B, heads, inferred, D]."""
    # Only one axis may be inferred: the number of rows. So D is given.
    shape = ir.tensor([0, heads, -1, axis(value, 3)], ir.DataType.INT64, f"heads_{heads}")
    return ir.node("Reshape", [value, constant(graph, shape)])


def _stacked(graph: ir.Graph, mask: ir.Value, groups: int) -> ir.Value:
    """The mask repeated `groups` times along its rows, computed once for all layers."""
    if mask.producer() is None:
        raise ValueError(
            "the mask is an input of the graph; expected it to be computed in the graph"
        )
    return shared(graph, "Concat", [mask] * groups, {"axis": 2})
