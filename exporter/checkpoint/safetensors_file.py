"""Which tensors lie where in safetensors files. Reads headers only; knows nothing about models.

The format: eight bytes with the header's length, a JSON header, then the tensors without gaps
(https://github.com/huggingface/safetensors, "Format"). The header is parsed here rather than by
the safetensors package because a later stage copies the byte ranges without parsing them, and
because errors should name the tensor and the file.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from exporter.checkpoint.fields import read_json
from exporter.checkpoint.stored import ByteRange, StoredTensor
from graphs.errors import MistralcError

_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
               "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
               "F8_E4M3": 1, "F8_E5M2": 1}  # fmt: skip
_LARGEST_HEADER = 100_000_000  # bytes; the safetensors library's own limit
_LONGEST_NAME = 200  # characters of a file's name; file systems end at 255 bytes

Tensors = dict[str, StoredTensor]


def read_file(path: Path) -> Tensors:
    """Every tensor of one safetensors file by name. Raises MistralcError where it is damaged."""
    size = path.stat().st_size
    header, start = _header(path, size)
    tensors: Tensors = {}
    end = start
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    for name, entry in sorted(entries.items(), key=lambda item: _begin(path, *item)):
        tensor = _tensor(path, name, entry, start)
        if tensor.where.offset != end:
            raise _damaged(path, f"the bytes of {name} do not follow those of the tensor before")
        end += tensor.where.length
        if end > size:
            raise MistralcError(
                f"{path} is truncated: it has {size:,} bytes, and the tensor {name} is expected "
                f"to end at byte {end:,}. Fetch the file again."
            )
        tensors[name] = tensor
    if end != size:
        raise _damaged(path, f"{size - end:,} bytes follow the last tensor")
    return tensors


def read_index(index: Path) -> Tensors:
    """Every tensor of a sharded checkpoint by name, from its `*.safetensors.index.json`.

    The index and the shards have to say the same, name by name.
    """
    fields = read_json(index)
    section = fields.section("weight_map")
    if section is None or not all(isinstance(file, str) for file in section.values.values()):
        raise fields.wrong("weight_map", "an object from tensor names to file names")
    where: Mapping[str, str] = section.values
    shards = {file: read_file(_shard(index, name, file)) for name, file in _first_of_each(where)}
    found = {name: file for file, tensors in shards.items() for name in tensors}
    for name, file in where.items():
        if name not in shards[file]:
            place = f"it lies in {found[name]}" if name in found else "no shard holds it"
            raise MistralcError(
                f"{index} says that {name} is in {file}, but {place}. The shards and the index "
                "of one checkpoint are expected: fetch both again."
            )
    for file, tensors in shards.items():
        for name in tensors:
            if where.get(name) != file:
                raise MistralcError(
                    f"{index.parent / file} holds {name}, which the index {index.name} does not "
                    "place there. The shards and the index of one checkpoint are expected: "
                    "fetch both again."
                )
    return {name: shards[file][name] for name, file in where.items()}


def _first_of_each(where: Mapping[str, str]) -> list[tuple[str, str]]:
    """One (tensor, shard) for each shard, so that an error about a shard can name a tensor."""
    return [(name, file) for file, name in {file: name for name, file in where.items()}.items()]


def _shard(index: Path, name: str, file: str) -> Path:
    path = index.parent / file
    if Path(file).name != file or len(file) > _LONGEST_NAME or not path.is_file():
        raise MistralcError(
            f"{index} places {name:.80} in {file:.80}, and there is no such file in "
            f"{index.parent}. All shards are expected beside their index: fetch the missing one."
        )
    return path


def _header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """The header, and the byte at which the tensors begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
            raise _damaged(path, f"the header is said to be {length:,} bytes long")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(header, dict):
        raise _damaged(path, "the header is not a JSON object")
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name:.80} is there twice")
    return result


def _begin(path: Path, name: str, entry: Any) -> int:
    """The first byte of a tensor, counted from the header's end, once its entry is well formed."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not _counts(offsets) or len(offsets) != 2 or not _counts(entry.get("shape")):
        raise _damaged(path, f"the entry of {name} has no shape and data_offsets")
    return offsets[0]


def _counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _tensor(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    begin, end = entry["data_offsets"]
    dtype = str(entry.get("dtype"))
    expected = math.prod(entry["shape"]) * _ITEM_SIZES.get(dtype, 0)
    if end < begin or (dtype in _ITEM_SIZES and end - begin != expected):
        raise _damaged(
            path, f"{name} has {end - begin:,} bytes where its shape and {dtype} need {expected:,}"
        )
    where = ByteRange(
        path=path, offset=start + begin, length=end - begin, dtype=_FLOATS.get(dtype, dtype)
    )
    return StoredTensor(name=name, shape=tuple(entry["shape"]), where=where)


def _damaged(path: Path, what: str) -> MistralcError:
    return MistralcError(
        f"{path} is not a whole safetensors file: {what}. A header that describes all bytes of "
        "the file is expected. Fetch the file again."
    )
