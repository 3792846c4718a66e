"""Map the bytes of a weight in a file as a tensor. Knows nothing about canonical names.

No file is held open: a tensor maps its own bytes, and unmaps them when it is freed.
"""

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from graphs.dtypes import ELEMENT_TYPES, FLOATS
from graphs.errors import MistralcError

TORCH_FLOATS: Mapping[str, torch.dtype] = {
    name: getattr(torch, ELEMENT_TYPES[name].torch or name) for name in FLOATS
}
"""torch's dtype by our name, for the types that a graph may compute in."""

_RAW: Mapping[str, torch.dtype] = {
    **TORCH_FLOATS, "I8": torch.int8, "U8": torch.uint8, "I32": torch.int32, "U32": torch.int32,
    "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip

FLOAT_NAMES: Mapping[str, str] = {ELEMENT_TYPES[name].safetensors: name for name in FLOATS}
"""Our name by the one in a weight file: safetensors and GGUF both say F32, F16 and BF16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRange:
    """`length` bytes at `offset` of the file `path`.

    `dtype` is the type of the values: a key of `TORCH_FLOATS`, or the file format's own name for
    any other type (`Q4_1`, `I8`).
    """

    path: Path
    offset: int
    length: int
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One row-major tensor of a weight file, under the name that it has there."""

    name: str
    shape: tuple[int, ...]
    where: ByteRange


def map_bytes(where: ByteRange) -> torch.Tensor:
    """Map a byte range as uint8 [length]; pages are read when they are touched.

    The mapping is private and copy-on-write, so writing to the tensor never changes the file.
    Raises MistralcError if the file has changed since it was opened.
    """
    start = where.offset - where.offset % mmap.ALLOCATIONGRANULARITY
    length = where.offset + where.length - start
    try:
        with where.path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=start)
    except (OSError, ValueError) as error:
        raise MistralcError(
            f"{where.path} changed while it was being read ({error}); expected the file that was "
            "there at the start. Try again when nothing writes to it."
        ) from error
    return torch.frombuffer(
        mapped, dtype=torch.uint8, count=where.length, offset=where.offset - start
    )


def map_tensor(stored: StoredTensor) -> torch.Tensor:
    """Return a tensor in its stored dtype and shape, memory-mapped if it is aligned.

    Besides floats it takes the types that quantized weights are made of. Unsigned words of 32 bits
    come as int32: they hold packed codes, whose bits are what counts.
    """
    dtype = _RAW[stored.where.dtype]
    data = map_bytes(stored.where)
    if stored.where.offset % dtype.itemsize:
        data = data.clone()  # torch needs a tensor to start at a multiple of its item size
    return data.view(dtype).view(stored.shape)
