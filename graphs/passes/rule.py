"""The contract of a graph pass: pattern, check, rewrite.

A pass declares how often it must fire on a given model. If it fires less often, the export stops
with the reasons that its check gave: a rewrite that silently stops matching makes a graph slow or
wrong without anyone noticing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import onnx_ir as ir

from graphs.spec import ModelSpec

Match = TypeVar("Match")
Attributes = Mapping[str, int | float | str]
CONTRIB = (
    "com.microsoft"  # the domain of ONNX Runtime's own operators; not allowed in a portable graph
)


class Pass(Protocol):
    """Rewrites a model in place and returns how often it did."""

    @property
    def name(self) -> str:
        """The name in reports and errors."""

    def __call__(self, model: ir.Model, spec: ModelSpec) -> int:
        """Rewrite `model` in place; returns how many times the pass fired."""


class PassError(AssertionError):
    """A pass did not fire as declared: a defect of the pipeline, not of the input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule(Generic[Match]):
    """A pass made of three functions and the number of times that it must fire.

    `pattern` yields candidates. `check` returns None, or the reason why a candidate cannot be
    rewritten, naming the dimension or value. `rewrite` rewrites one. `expected` returns how many
    rewrites a model needs.
    """

    name: str
    pattern: Callable[[ir.Graph], Iterator[Match]]
    check: Callable[[Match], str | None]
    rewrite: Callable[[ir.Graph, Match], None]
    expected: Callable[[ModelSpec], int]

    def __call__(self, model: ir.Model, spec: ModelSpec) -> int:
        """Rewrite every match. Raises PassError unless it fired `expected(spec)` times."""
        fired, reasons = 0, []
        for match in list(self.pattern(model.graph)):
            reason = self.check(match)
            if reason is None:
                self.rewrite(model.graph, match)
                fired += 1
            else:
                reasons.append(reason)
        if fired != self.expected(spec):
            why = "; ".join(dict.fromkeys(reasons)) or "its pattern matched nothing in the graph"
            raise PassError(
                f"pass {self.name} fired {fired} times; expected {self.expected(spec)}: {why}"
            )
        return fired


@dataclass(frozen=True, slots=True, kw_only=True)
class Cleanup:
    """A pass that may find nothing to do, such as constant folding."""

    name: str
    run: Callable[[ir.Model], int]

    def __call__(self, model: ir.Model, spec: ModelSpec) -> int:  # noqa: ARG002
        """Clean `model` in place; returns how many nodes were removed."""
        return self.run(model)


def producer_of(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that computes `value`, if it is of type `op_type`."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def shared(
    graph: ir.Graph, op_type: str, inputs: Sequence[ir.Value], attributes: Attributes | None = None
) -> ir.Value:
    """The result of `op_type` on `inputs`, computed once for all readers.

    The node is inserted after the producer of the first input, whose type the result has.
    """
    first = inputs[0]
    for node in first.consumers():
        if node.op_type == op_type and node.inputs == tuple(inputs):
            return node.outputs[0]
    new = ir.node(op_type, inputs, attributes)
    new.outputs[0].type = first.type
    source = first.producer()
    if source is None:  # an input of the graph
        graph.insert_before(graph[0], new)
    else:
        graph.insert_after(source, new)
    return new.outputs[0]


def constant(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """The initializer of the tensor's name; it is created from the tensor if there is none."""
    value = graph.initializers.get(str(tensor.name))
    if value is None:
        value = ir.Value(
            name=tensor.name, shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype), const_value=tensor,
        )  # fmt: skip
        graph.register_initializer(value)
    return value
