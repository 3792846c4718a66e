"""Pad the query by one row so a single token uses the same kernel as a batch of tokens.

ONNX Runtime's kernel for one row sums in another order than its kernel for several rows, so the
last bits of a token depend on whether it was computed alone. The kernels for two rows and for more
agree. A query of zeros is added behind the others and its result is dropped: attention always has
at least two rows, and a token has the same bits however a text is cut into steps.

    q ────┐                    q ──── Pad ─┐
    mask ─┴─ Attention ─   →   mask ─ Pad ─┴─ Attention ─ Slice ─

`GroupQueryAttention` also writes a key and a value for that query, into the slot after the last
token's; the next step overwrites them. Its caches have `PADDED` slots more than the ring counts.
"""

from collections.abc import Iterator

import onnx_ir as ir

from graphs.contract import PADDED
from graphs.passes.rule import Rule, constant, shared
from graphs.spec import ModelSpec


def _pattern(graph: ir.Graph) -> Iterator[ir.Node]:
    return (node for node in graph if node.op_type in ("Attention", "GroupQueryAttention"))


def _check(node: ir.Node) -> str | None:
    if node.op_type == "Attention" and (len(node.inputs) < 4 or node.inputs[3] is None):
        return f"{node.name} has no mask"
    return None


def _rewrite(graph: ir.Graph, node: ir.Node) -> None:
    if node.op_type == "Attention":  # query [B, H, S, D], mask [B, 1, S, C]
        axis = 2
        longer = {0: _padded(graph, node, 0, 4, axis), 3: _padded(graph, node, 3, 4, axis)}
    else:  # q, k and v [B, S, (H + 2K) D], last positions [B], their number, positions [B, S]
        axis = 1
        longer = {0: _padded(graph, node, 0, 3, axis), 5: _next(graph, node, 5),
                  6: _next(graph, node, 6)}  # fmt: skip
        if node.inputs[1] is not None:  # k and v [B, S, K D] apart from q
            longer |= {i: _padded(graph, node, i, 3, axis) for i in (1, 2)}
        if len(node.inputs) > 9:
            longer[9] = _padded(graph, node, 9, 2, axis)
    for index, value in longer.items():
        node.replace_input_with(index, value)
    _drop_last(graph, node, axis)


def _padded(graph: ir.Graph, node: ir.Node, index: int, rank: int, axis: int) -> ir.Value:
    """Input `index` of `node`, one longer on `axis`.

    Queries are padded with zeros; keys, values, masks and positions repeat their last.
    """
    pads = [0] * (2 * rank)
    pads[rank + axis] = PADDED
    amount = constant(graph, ir.tensor(pads, ir.DataType.INT64, f"pad_{axis}_of_{rank}"))
    mode = "edge" if index else "constant"
    return shared(graph, "Pad", [_input(node, index), amount], {"mode": mode})


def _next(graph: ir.Graph, node: ir.Node, index: int) -> ir.Value:
    """Input `index` of `node`, plus one."""
    one = constant(graph, ir.tensor(PADDED, ir.DataType.INT32, "padded_queries"))
    return shared(graph, "Add", [_input(node, index), one])


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    if value is None:
        raise ValueError(f"{node.name} lacks its input {index}")
    return value


def _drop_last(graph: ir.Graph, node: ir.Node, axis: int) -> None:
    """Make every reader of the result of `node` read it without the last element of `axis`."""
    bounds = [
        constant(graph, ir.tensor([bound], ir.DataType.INT64, f"{name}_of_axis_{axis}"))
        for name, bound in (("start", 0), ("end", -PADDED), ("number", axis))
    ]
    output = node.outputs[0]
    kept = ir.node("Slice", [None, *bounds])
    kept.outputs[0].type, kept.outputs[0].shape, output.shape = output.type, output.shape, None
    output.replace_all_uses_with(kept.outputs[0])
    kept.replace_input_with(0, output)
    graph.insert_after(node, kept)


def _expected(spec: ModelSpec) -> int:
    return spec.num_hidden_layers


PAD_QUERY = Rule(
    name="pad_query", pattern=_pattern, check=_check, rewrite=_rewrite, expected=_expected
)
