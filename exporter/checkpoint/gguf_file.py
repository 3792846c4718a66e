"""Metadata and tensors of a GGUF file. Knows nothing about models; reads no weight until asked.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little
endian. Block types and their dequantization come from the `gguf` package. Its reader is not
used: it makes one array object for each string and takes 2.6 s where this takes 0.1 s (49,152
tokens and 48,900 merges), and a damaged file ends it with whatever NumPy happens to raise.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from exporter.checkpoint.stored import ByteRange, StoredTensor, map_bytes
from graphs.errors import MistralcError

_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}  # fmt: skip
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile:
    """What a GGUF file says: metadata as plain Python values, and where each tensor lies.

    Shapes are row-major, as everywhere here: the reverse of the order in the file.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file. Raises MistralcError where it is none or is damaged."""
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
            raise _damaged(path, f"its header breaks off or is garbled ({error})") from error
        start = _align(path, metadata, cursor.position)
    tensors = {name: _tensor(path, name, info, start, size) for name, info in infos.items()}
    return GgufFile(path=path, metadata=metadata, tensors=tensors)


def is_readable(dtype: str) -> bool:
    """Whether `dequantize` can read tensors of this GGUF block type."""
    try:
        _dequantize_zeros(gguf.GGMLQuantizationType[dtype])
    except (KeyError, NotImplementedError):
        return False
    return True


def dequantize(stored: StoredTensor) -> torch.Tensor:
    """A tensor of any block type as float32 in its shape."""
    kind = gguf.GGMLQuantizationType[stored.where.dtype]
    rows = map_bytes(stored.where).view(*stored.shape[:-1], -1).numpy()
    return torch.from_numpy(gguf.quants.dequantize(rows, kind)).view(stored.shape)


@cache
def _dequantize_zeros(kind: gguf.GGMLQuantizationType) -> None:
    """Raises NotImplementedError where the package cannot read one block of this type."""
    if not kind.name.startswith(("Q", "IQ", "TQ", "MXFP", "NVFP")):
        raise NotImplementedError(kind.name)  # F64 and integers are no weights
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)


class _Cursor:
    """A position in the mapped file that moves on with every value read."""

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
        if item != _STRING:  # nested arrays are allowed by the format and used by nobody
            raise struct.error(f"an array of value type {item}")
        return [self.string() for _ in range(count)]


def _preamble(cursor: _Cursor) -> tuple[int, int]:
    """The number of tensors and of metadata keys, once magic and version are right."""
    if bytes(cursor.values("B", 4)) != b"GGUF":
        raise _damaged(cursor.path, "it does not begin with the letters GGUF")
    version = cursor.number("I")
    if version not in _VERSIONS:
        swapped = version & 0xFFFF == 0  # a big-endian file's small number, read from the left
        raise MistralcError(
            f"{cursor.path} is "
            + ("a big-endian GGUF file" if swapped else f"a GGUF file of version {version}")
            + f"; little-endian version {' or '.join(map(str, _VERSIONS))} is expected. Convert "
            "the checkpoint again with a current llama.cpp."
        )
    return cursor.number("Q"), cursor.number("Q")


def _pair(cursor: _Cursor) -> tuple[str, Any]:
    return cursor.string(), cursor.value(cursor.number("I"))


def _info(cursor: _Cursor) -> tuple[str, tuple[tuple[int, ...], int, int]]:
    """Name, then shape, type number and offset."""
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
            raise _damaged(path, f"{name} is there twice")
        result[name] = value
    return result


def _align(path: Path, metadata: dict[str, Any], position: int) -> int:
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise _damaged(path, f"general.alignment is {alignment!r}, not a power of two")
    return -(-position // alignment) * alignment


def _tensor(
    path: Path, name: str, info: tuple[tuple[int, ...], int, int], start: int, size: int
) -> StoredTensor:
    shape, number, offset = info
    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError as error:
        raise MistralcError(
            f"{path}: the tensor {name} has type number {number}, which gguf "
            "does not know; float or a quantization it can read is expected. "
            "Update the gguf package."
        ) from error
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if shape and shape[-1] % block:
        raise _damaged(path, f"rows of {name} hold {shape[-1]} values, not blocks of {block}")
    length = math.prod(shape) // block * block_bytes
    if start + offset + length > size:
        raise MistralcError(
            f"{path} is truncated: it has {size:,} bytes, and the tensor {name} is expected to "
            f"end at byte {start + offset + length:,}. Fetch the file again."
        )
    where = ByteRange(
        path=path,
        offset=start + offset,
        length=length,
        dtype=_FLOATS.get(kind.name, kind.name),
    )
    return StoredTensor(name=name, shape=shape, where=where)


def _damaged(path: Path, what: str) -> MistralcError:
    return MistralcError(
        f"{path} is not a whole GGUF file: {what}. A file that llama.cpp's converter wrote is "
        "expected. Fetch the file again."
    )
