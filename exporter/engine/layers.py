"""TensorRT's own list of an engine's layers, one line each. Judges nothing.

    Name: _gemv_mha_v1_myl0_4, LayerType: kgen, Inputs: [ { Name: present_key.0, Dimensions:
    [-1,2,128,64], Strides: [16384,8192,64,1], StrideOrder: …, Datatype: Half, Format: … }, …],
    Constants: […], Outputs: […], TacticName: , StreamId: 0, Metadata: [ONNX Layer: node_attention]

`_myl0_4` is the fifth layer of profile 0. Beyond that, names hold `[profile 1]`, which is left out.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Self

BITS = {
    "Float": 32, "Half": 16, "BFloat16": 16, "FP8": 8,
    "Int64": 64, "Int32": 32, "Int8": 8, "Int4": 4, "Bool": 8,
}  # fmt: skip
"""Bits of an element, by the word that the list has for its type."""

_NAME = re.compile(r"Name: (.+?), LayerType: (\w*)")
_PROFILE = re.compile(r"_myl(\d+)_\d+$")
_SECTION = re.compile(
    r"(Inputs|Constants|Outputs): \[(.*?)\](?=, (?:Constants|Outputs|TacticName):)"
)
_TENSOR = re.compile(r"\{ Name: ([^,]+), Dimensions: \[([^\]]*)\]([^{}]*)\}")
_STRIDES, _DTYPE = re.compile(r"Strides: \[([^\]]*)\]"), re.compile(r"Datatype: (\w+)")
_PROFILE_NAME = re.compile(r" \[profile \d+\]")
_SOURCE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_OPERATION = re.compile(r"[A-Z][a-z]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTensor:
    """A tensor that a layer reads or writes. An axis that the profile leaves open is -1."""

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str

    @property
    def count(self) -> int:
        """Elements, with every open axis as 1."""
        return prod(abs(size) for size in self.shape)

    @property
    def bits(self) -> int:
        """Bits of an element; 8 for a type that is not in `BITS`."""
        return BITS.get(self.dtype, 8)

    @property
    def nbytes(self) -> int:
        """Bytes of `count` elements."""
        return -(-self.count * self.bits // 8)

    @property
    def layout(self) -> tuple[str, tuple[int, ...]]:
        """The type, and the axes in the order in which they lie in memory, ones left out.

        A weight and its transposed view have the same layout, so they may be one buffer.
        """
        axes = sorted(zip(self.strides, self.shape, strict=True), reverse=True)
        return self.dtype, tuple(size for _, size in axes if size != 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerInfo:
    """One layer: the tensors it reads and writes, and the ONNX nodes that it implements."""

    name: str
    kind: str
    profile: int
    inputs: tuple[EngineTensor, ...]
    constants: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    nodes: frozenset[str]

    @property
    def operations(self) -> tuple[str, ...]:
        """What a generated kernel computes: (Resh, Tran) for `__myl_ReshTran_myl0_4`."""
        found = re.fullmatch(r"__myl_(\w+?)_myl\d+_\d+", self.name)
        return tuple(_OPERATION.findall(found[1])) if found else ()

    @property
    def family(self) -> str:
        """The name without what numbers it, so that equal kernels of all layers share it."""
        return re.sub(r"_\d+(?=\+|$)", "", re.sub(r"_myl\d+_\d+$", "", self.name))

    @classmethod
    def parse(cls, line: str) -> Self | None:
        """Parse a line of the list; None if it does not describe a layer."""
        line = _PROFILE_NAME.sub("", line)
        found = _NAME.match(line)
        if found is None:
            return None
        sections = dict(_SECTION.findall(line))
        profile = _PROFILE.search(found[1])
        inputs, constants, outputs = (
            tuple(_tensors(sections.get(name, ""))) for name in ("Inputs", "Constants", "Outputs")
        )
        return cls(
            name=found[1], kind=found[2], profile=int(profile[1]) if profile else 0,
            inputs=inputs, constants=constants, outputs=outputs,
            nodes=frozenset(_SOURCE.findall(line)),
        )  # fmt: skip


def parse_layers(lines: Iterable[str]) -> list[LayerInfo]:
    """Parse the whole list; lines that describe no layer are left out."""
    return [layer for layer in map(LayerInfo.parse, lines) if layer is not None]


def _tensors(text: str) -> Iterable[EngineTensor]:
    for name, dimensions, rest in _TENSOR.findall(text):
        shape, strides, dtype = _numbers(dimensions), _STRIDES.search(rest), _DTYPE.search(rest)
        yield EngineTensor(
            name=name, shape=shape,
            strides=_numbers(strides[1]) if strides else (0,) * len(shape),
            dtype=dtype[1] if dtype else "",
        )  # fmt: skip


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part.strip())
