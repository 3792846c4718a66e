"""Where a weight lies in a file, and how its bytes become a tensor. Knows nothing about names.

Nothing here holds a file open: a tensor maps its own bytes and unmaps them when it goes.
"""

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from graphs.errors import MistralcError

FLOATS: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRange:
    """`length` bytes from `offset` on in the file `path`; `dtype` says how to read them.

    `dtype` is a key of `FLOATS`, or the file format's own name for another type (`Q4_1`, `I8`).
    """

    path: Path
    offset: int
    length: int
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor of a weight file under the name it has there, row-major."""

    name: str
    shape: tuple[int, ...]
    where: ByteRange


def map_bytes(where: ByteRange) -> torch.Tensor:
    """The bytes of a range as uint8 [length], memory-mapped: pages are read when touched.

    The mapping is private and copy-on-write, so changing the tensor never changes the file.
    """
    start = where.offset - where.offset % mmap.ALLOCATIONGRANULARITY
    length = where.offset + where.length - start
    try:
        with where.path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=start)
    except (OSError, ValueError) as error:
        raise MistralcError(
            f"{where.path} changed while it was being read ({error}); the file that was there at "
            "the start is expected. Start again once nothing writes to it."
        ) from error
    return torch.frombuffer(
        mapped, dtype=torch.uint8, count=where.length, offset=where.offset - start
    )


def map_tensor(stored: StoredTensor) -> torch.Tensor:
    """A float tensor in its stored dtype and shape, memory-mapped where its address allows it."""
    dtype = FLOATS[stored.where.dtype]
    data = map_bytes(stored.where)
    if stored.where.offset % dtype.itemsize:
        data = data.clone()  # a torch tensor has to start at a multiple of its item size
    return data.view(dtype).view(stored.shape)
