"""Share one initializer between a tied embedding and the output layer.

The tracer sees two parameters. Both are made of the same checkpoint tensor, so the bundle stores it
once.
"""

from collections.abc import Iterator
from typing import NamedTuple

import onnx_ir as ir

from graphs.passes.rule import Rule
from graphs.passes.weight_ref import weight_of
from graphs.spec import HEAD, ModelSpec


class Twins(NamedTuple):
    """Two initializers made of the same checkpoint tensors."""

    kept: ir.Value
    dropped: ir.Value


def _pattern(graph: ir.Graph) -> Iterator[Twins]:
    first: dict[tuple[str, ...], ir.Value] = {}
    for value in graph.initializers.values():
        weight = weight_of(value)
        if weight is not None:
            kept = first.setdefault(weight.parts, value)
            if kept is not value:
                yield Twins(kept, value)


def _check(twins: Twins) -> str | None:
    if twins.kept.shape != twins.dropped.shape:
        kept, dropped = twins
        return f"{kept.name} is {kept.shape} and {dropped.name} is {dropped.shape}"
    return None


def _rewrite(graph: ir.Graph, twins: Twins) -> None:
    kept, dropped = sorted(twins, key=lambda value: value.name == HEAD)
    dropped.replace_all_uses_with(kept)
    del graph.initializers[str(dropped.name)]


def _expected(spec: ModelSpec) -> int:
    return int(spec.tie_word_embeddings)


TIE_EMBEDDING = Rule(
    name="tie_embedding", pattern=_pattern, check=_check, rewrite=_rewrite, expected=_expected
)
