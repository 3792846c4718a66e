"""Placeholders for weights in a graph.

A `WeightRef` has a shape, a dtype, the names of the checkpoint tensors it is made of, and no
numbers: a pass that tries to compute with one fails. So a 7B graph is rewritten in a few megabytes,
and merging q, k and v means joining three names.
"""

from collections.abc import Mapping
from typing import NoReturn

import onnx_ir as ir

from graphs.dtypes import ELEMENT_TYPES

ONNX_DTYPE: Mapping[str, ir.DataType] = {
    name: ir.DataType(element.onnx) for name, element in ELEMENT_TYPES.items()
}
"""ONNX's element types by our names."""


class WeightRef(ir.LazyTensor):
    """A weight that has not been read: the rows of `parts`, one after another (axis 0).

    `parts` are canonical checkpoint names (see `ModelSpec.weight_shapes`). `dtype` is the element
    type in the bundle, which may differ from the checkpoint's. Reading its numbers raises
    TypeError.
    """

    def __init__(
        self, name: str, parts: tuple[str, ...], shape: tuple[int, ...], dtype: ir.DataType
    ) -> None:
        super().__init__(self._refuse, dtype=dtype, shape=ir.Shape(shape), name=name)
        self.parts, self.sizes = parts, shape  # `shape` with plain integers

    def __repr__(self) -> str:
        return f"WeightRef({'+'.join(self.parts)}, {self.dtype}, {self.shape})"

    def _refuse(self) -> NoReturn:
        raise TypeError(
            f"{self!r} was asked for its numbers. Weights are streamed into the bundle after all "
            "passes have run; a pass works on names and shapes only."
        )


def weight_of(value: ir.Value | None) -> WeightRef | None:
    """The weight that `value` stands for; None if it is computed or a small constant."""
    tensor = None if value is None else value.const_value
    return tensor if isinstance(tensor, WeightRef) else None
