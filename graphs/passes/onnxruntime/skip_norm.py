"""Fuse a residual addition and the norm that follows it.

ONNX Runtime's `SkipSimplifiedLayerNormalization` adds, normalizes and returns both results, so the
residual stream is read once. It computes RMSNorm in float32, as the standard operator does with
`stash_type` 1.

    a ─┬─ Add ─┬─ RMSNormalization ─          a ─┬─ SkipSimplifiedLayerNormalization ─┬─ normal
    b ─┘       └─────────────────── sum   →   b ─┘                                    └─ sum
"""

from collections.abc import Iterator
from typing import NamedTuple

import onnx_ir as ir

from graphs.passes.rule import CONTRIB, Rule, producer_of
from graphs.spec import ModelSpec


class Residual(NamedTuple):
    """An addition, and the norm that reads its sum."""

    add: ir.Node
    norm: ir.Node


def _pattern(graph: ir.Graph) -> Iterator[Residual]:
    for node in graph:
        add = producer_of(node.inputs[0], "Add") if node.op_type == "RMSNormalization" else None
        if add is not None:
            yield Residual(add, node)


def _check(found: Residual) -> str | None:
    shapes = [None if value is None else value.shape for value in found.add.inputs]
    return None if shapes[0] == shapes[1] else f"{found.add.name} adds {shapes[0]} and {shapes[1]}"


def _rewrite(graph: ir.Graph, found: Residual) -> None:
    add, norm = found
    epsilon = norm.attributes["epsilon"].as_float()
    fused = ir.node(
        "SkipSimplifiedLayerNormalization", [*add.inputs, norm.inputs[1]], {"epsilon": epsilon},
        num_outputs=4, domain=CONTRIB,
    )  # fmt: skip
    normal, _, _, total = fused.outputs
    for new, old in ((normal, norm.outputs[0]), (total, add.outputs[0])):
        new.name, new.type, new.shape = old.name, old.type, old.shape
    for unused in fused.outputs[1:3]:
        unused.name = ""
    graph.insert_before(add, fused)
    norm.outputs[0].replace_all_uses_with(normal)
    add.outputs[0].replace_all_uses_with(total)
    graph.remove([norm, add], safe=True)


def _expected(spec: ModelSpec) -> int:
    # Two per layer, but the first norm follows no addition, and the last reads only wanted rows.
    return 2 * spec.num_hidden_layers - 1


SKIP_NORM = Rule(
    name="skip_norm", pattern=_pattern, check=_check, rewrite=_rewrite, expected=_expected
)
