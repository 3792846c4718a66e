"""Read the metadata and find the tensors of a GGUF file. Knows nothing about models.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little
endian. Block types and their dequantization come from the `gguf` package. We do not use its
reader: it makes one array object per string and takes 2.6 s where this takes 0.1 s (49,152
tokens and 48,900 merges), and on a damaged file it raises whatever NumPy happens to raise.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporter.checkpoint.stored import FLOAT_NAMES, ByteRange, StoredTensor, map_bytes
from graphs.errors import MistralcError

_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile:
    """Metadata as plain Python values, and the tensors with their byte ranges.

    Shapes are row-major, as in the rest of the exporter: the reverse of the order in the file.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file. Raises MistralcError if the file is damaged or not GGUF."""
    size = path.stat().st_size
    if size < 24:
        raise _damaged(path, f"it has only {size} bytes")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(path, data)
        tensor_count, key_count = _preamble(cursor)
        try:
            metadata = _unique(path, (_pair(cursor) for _ in range(key_count)))
            infos = _unique(path, (_info(cursor) for _ in range(tensor_count)))
        except (struct.error, UnicodeDecodeError, OverflowError) as error:
            raise _damaged(path, f"its header is cut short or garbled ({error})") from error
        start = _align(path, metadata, cursor.position)
    tensors = {name: _tensor(path, name, info, start, size) for name, info in infos.items()}
    return GgufFile(path=path, metadata=metadata, tensors=tensors)


def is_readable(dtype: str) -> bool:
    """Whether `dequantize` can read tensors of this GGUF block type."""
    try:
        _dequantize_zeros(dtype)
    except (KeyError, NotImplementedError):
        return False
    return True


def dequantize(stored: StoredTensor, start: int, stop: int) -> torch.Tensor:
    """Dequantize rows `start` to `stop` of a tensor of any block type to float32.

    A tensor of one dimension is one row of blocks, and is decoded whole.
    """
    gguf = _package()
    kind = gguf.GGMLQuantizationType[stored.where.dtype]
    rows = map_bytes(stored.where).view(*stored.shape[:-1], -1)
    if len(stored.shape) > 1:
        rows = rows[start:stop]
    weight: torch.Tensor = torch.from_numpy(gguf.quants.dequantize(rows.numpy(), kind))
    return weight[start:stop] if len(stored.shape) == 1 else weight


def block_size(dtype: str) -> int:
    """Return the bytes of one block of this type."""
    gguf = _package()
    size: int = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[dtype]][1]
    return size


@cache
def _dequantize_zeros(dtype: str) -> None:
    """Raise KeyError or NotImplementedError if the package cannot read a block of this type."""
    gguf = _package()
    kind = gguf.GGMLQuantizationType[dtype]
    if not kind.name.startswith(("Q", "IQ", "TQ", "MXFP", "NVFP")):
        raise NotImplementedError(kind.name)  # F64 and integers hold no weights
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)


def _package() -> Any:
    """The package `gguf`, imported on first use: checkpoints of other formats do not need it."""
    import gguf

    return gguf


class _Cursor:
    """A position in the mapped file, which every read advances."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position = path, data, 0

    def values(self, code: str, count: int = 1) -> tuple[Any, ...]:
        if count > len(self.data):
            raise struct.error(f"{count} values in a file of {len(self.data)} bytes")
        layout = struct.Struct(f"<{count}{code}")
        result = layout.unpack_from(self.data, self.position)
        self.position += layout.size
        return result

    def number(self, code: str) -> int:
        value: int = self.values(code)[0]
        return value

    def string(self) -> str:
        length = self.number("Q")
        text = self.data[self.position : self.position + length]
        if len(text) != length:
            raise struct.error(f"a string of {length} bytes")
        self.position += length
        return text.decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.values(_SCALARS[kind])[0]
        if kind != _ARRAY:
            raise struct.error(f"value type {kind}")
        item, count = self.number("I"), self.number("Q")
        if item in _SCALARS:
            return list(self.values(_SCALARS[item], count))
        if item != _STRING:  # the format allows nested arrays; no converter writes them
            raise struct.error(f"an array of value type {item}")
        return [self.string() for _ in range(count)]


def _preamble(cursor: _Cursor) -> tuple[int, int]:
    """Check magic and version; returns the number of tensors and of metadata keys."""
    if bytes(cursor.values("B", 4)) != b"GGUF":
        raise _damaged(cursor.path, "it does not begin with the letters GGUF")
    version = cursor.number("I")
    if version not in _VERSIONS:
        swapped = (
            version & 0xFFFF == 0
        )  # a small number of a big-endian file, read as little-endian
        raise MistralcError(
            f"{cursor.path} is "
            + ("a big-endian GGUF file" if swapped else f"a GGUF file of version {version}")
            + f"; expected little-endian version {' or '.join(map(str, _VERSIONS))}. Convert the "
            "checkpoint again with a current llama.cpp."
        )
    return cursor.number("Q"), cursor.number("Q")


def _pair(cursor: _Cursor) -> tuple[str, Any]:
    return cursor.string(), cursor.value(cursor.number("I"))


def _info(cursor: _Cursor) -> tuple[str, tuple[tuple[int, ...], int, int]]:
    """Read one tensor's entry: name, then shape, type number and offset."""
    name = cursor.string()
    dimensions = cursor.number("I")
    if dimensions > 8:  # ggml has 4
        raise struct.error(f"{dimensions} dimensions of tensor {name}")
    shape = tuple(reversed(cursor.values("Q", dimensions)))
    return name, (shape, cursor.number("I"), cursor.number("Q"))


def _unique(path: Path, pairs: Any) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise _damaged(path, f"{name} appears twice")
        result[name] = value
    return result


def _align(path: Path, metadata: dict[str, Any], position: int) -> int:
    alignment = metadata.get("general.alignment", _package().GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise _damaged(path, f"general.alignment is {alignment!r}, not a power of two")
    return -(-position // alignment) * alignment


def _tensor(
    path: Path, name: str, info: tuple[tuple[int, ...], int, int], start: int, size: int
) -> StoredTensor:
    shape, number, offset = info
    gguf = _package()
    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError as error:
        raise MistralcError(
            f"{path}: the tensor {name} has type number {number}, which the gguf package does not "
            "know; expected a float type or a quantization that it can read. Update the gguf "
            "package."
        ) from error
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if shape and shape[-1] % block:
        raise _damaged(
            path, f"rows of {name} have {shape[-1]} values, not a multiple of the block, {block}"
        )
    length = math.prod(shape) // block * block_bytes
    if start + offset + length > size:
        raise MistralcError(
            f"{path} is truncated: it has {size:,} bytes; expected the tensor {name} to end at "
            f"byte {start + offset + length:,}. Download the file again."
        )
    where = ByteRange(
        path=path,
        offset=start + offset,
        length=length,
        dtype=FLOAT_NAMES.get(kind.name, kind.name),
    )
    return StoredTensor(name=name, shape=shape, where=where)


def _damaged(path: Path, what: str) -> MistralcError:
    return MistralcError(
        f"{path} is not a whole GGUF file: {what}; expected a file written by llama.cpp's "
        "converter. Download the file again."
    )
