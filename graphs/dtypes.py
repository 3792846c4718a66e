"""Element types: one table from which every library's names for them are derived.

Standard library only. Views for torch, onnx_ir and NumPy stay in the packages that import these
libraries, and are built from this table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Dtype = Literal["float32", "float16", "bfloat16", "int64"]
"""Types that a graph computes with: floats for weights, caches and logits; int64 for ids."""

Codes = Literal["int4", "int8", "float8e4m3"]
"""Types that weights and activations are quantized to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ElementType:
    """One element type and what each format or library calls it.

    `onnx` is the number in onnx.proto's `TensorProto.DataType`, `tensorrt` the name in TensorRT's
    `DataType`, `torch` the attribute of the torch module. None: the library has no such type, or
    we never pass it one. `lowest` and `highest` bound the codes that a quantized weight may use.
    """

    name: str
    bits: int
    safetensors: str
    onnx: int
    tensorrt: str | None = None
    torch: str | None = None
    lowest: float | None = None
    highest: float | None = None

    @property
    def is_integer(self) -> bool:
        """Whether its values are whole numbers."""
        return "float" not in self.name

    def nbytes(self, count: int) -> int:
        """Bytes of `count` elements; types below 8 bits are packed."""
        return -(-count * self.bits // 8)


FLOATS: tuple[Dtype, ...] = ("float32", "float16", "bfloat16")
"""What a graph may compute in."""

_TYPES = (
    ElementType(name="float32", bits=32, safetensors="F32", onnx=1, tensorrt="FLOAT",
                torch="float32"),
    ElementType(name="float16", bits=16, safetensors="F16", onnx=10, tensorrt="HALF",
                torch="float16"),
    ElementType(name="bfloat16", bits=16, safetensors="BF16", onnx=16, tensorrt="BF16",
                torch="bfloat16"),
    ElementType(name="int64", bits=64, safetensors="I64", onnx=7, tensorrt="INT64",
                torch="int64"),
    ElementType(name="uint8", bits=8, safetensors="U8", onnx=2, torch="uint8"),
    ElementType(name="int8", bits=8, safetensors="I8", onnx=3, tensorrt="INT8", torch="int8",
                lowest=-128, highest=127),
    ElementType(name="float8e4m3", bits=8, safetensors="F8_E4M3", onnx=17, tensorrt="FP8",
                torch="float8_e4m3fn", lowest=-448.0, highest=448.0),
    # Two to a byte, the first in the low half; safetensors has no type for it.
    ElementType(name="int4", bits=4, safetensors="U8", onnx=22, tensorrt="INT4",
                lowest=-8, highest=7),
)  # fmt: skip

ELEMENT_TYPES: Mapping[str, ElementType] = MappingProxyType({one.name: one for one in _TYPES})
"""Every element type that a bundle's files may hold, by our name."""


def code_range(codes: str) -> tuple[float, float]:
    """The lowest and the highest code of a type that values are quantized to."""
    found = ELEMENT_TYPES[codes]
    if found.lowest is None or found.highest is None:
        raise ValueError(f"{codes} is not a type that values are quantized to")
    return found.lowest, found.highest


def item_size(dtype: Dtype) -> int:
    """Bytes of one element of a type that a graph computes with."""
    return ELEMENT_TYPES[dtype].bits // 8
