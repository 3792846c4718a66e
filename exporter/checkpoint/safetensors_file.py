"""Find the tensors in safetensors files. Reads headers only; knows nothing about models.

The format: eight bytes with the header's length, a JSON header, then the tensors without gaps
(https://github.com/huggingface/safetensors, "Format"). We parse the header ourselves because
`exporter/bundle/weights_file.py` copies the byte ranges without reading them, and because our
errors name both the tensor and the file.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from exporter.checkpoint.stored import FLOAT_NAMES, ByteRange, StoredTensor
from exporter.fields import read_json
from graphs.dtypes import ELEMENT_TYPES
from graphs.errors import MistralcError

_UNUSED_SIZES = {"F64": 8, "I32": 4, "I16": 2, "U64": 8, "U32": 4, "U16": 2, "BOOL": 1,
                 "F8_E5M2": 1, "F8_E8M0": 1}  # fmt: skip
_ITEM_SIZES = _UNUSED_SIZES | {
    one.safetensors: one.nbytes(1) for one in ELEMENT_TYPES.values()
}  # of every type in the format, so that the sizes of tensors we ignore are checked too
_LARGEST_HEADER = 100_000_000  # bytes; the safetensors library's own limit
_LONGEST_NAME = 200  # characters of a file name; file systems allow 255 bytes

Tensors = dict[str, StoredTensor]


def read_file(path: Path) -> Tensors:
    """Return every tensor of one file by name. Raises MistralcError if the file is damaged."""
    size = path.stat().st_size
    header, start = _read_header(path, size)
    tensors: Tensors = {}
    end = start
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    for name, entry in sorted(entries.items(), key=lambda item: _begin(path, *item)):
        tensor = _tensor(path, name, entry, start)
        if tensor.where.offset != end:
            raise _damaged(path, f"the bytes of {name} do not follow those of the previous tensor")
        end += tensor.where.length
        if end > size:
            raise MistralcError(
                f"{path} is truncated: it has {size:,} bytes; expected the tensor {name} to end at "
                f"byte {end:,}. Download the file again."
            )
        tensors[name] = tensor
    if end != size:
        raise _damaged(path, f"{size - end:,} bytes follow the last tensor")
    return tensors


def read_index(index: Path) -> Tensors:
    """Return every tensor of a sharded checkpoint by name, from its `*.safetensors.index.json`.

    Raises MistralcError unless the index and the shards agree on every name.
    """
    fields = read_json(index)
    section = fields.section("weight_map")
    if section is None or not all(isinstance(file, str) for file in section.values.values()):
        raise fields.invalid("weight_map", "an object from tensor names to file names")
    where: Mapping[str, str] = section.values
    shards = {
        file: read_file(_shard_path(index, name, file)) for name, file in _one_of_each_shard(where)
    }
    found = {name: file for file, tensors in shards.items() for name in tensors}
    for name, file in where.items():
        if name not in shards[file]:
            place = f"it is in {found[name]}" if name in found else "no shard has it"
            raise MistralcError(
                f"{index} says that {name} is in {file}, but {place}; expected the shards and the "
                "index of one checkpoint. Download both again."
            )
    for file, tensors in shards.items():
        for name in tensors:
            if where.get(name) != file:
                raise MistralcError(
                    f"{index.parent / file} has the tensor {name}, which {index.name} does not "
                    "list there; expected the shards and the index of one checkpoint. Download "
                    "both again."
                )
    return {name: shards[file][name] for name, file in where.items()}


def _one_of_each_shard(where: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return (tensor, shard) once per shard, so that an error about a shard can name a tensor."""
    return [(name, file) for file, name in {file: name for name, file in where.items()}.items()]


def _shard_path(index: Path, name: str, file: str) -> Path:
    path = index.parent / file
    if Path(file).name != file or len(file) > _LONGEST_NAME or not path.is_file():
        raise MistralcError(
            f"{index} places {name:.80} in {file:.80}, and there is no such file in "
            f"{index.parent}; expected every shard beside the index. Download the missing one."
        )
    return path


def _read_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """Read the header; returns it and the byte at which the tensors begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
            raise _damaged(path, f"its header claims a length of {length:,} bytes")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name:.80} appears twice")
    return result


def _begin(path: Path, name: str, entry: Any) -> int:
    """Check an entry's form; returns the tensor's first byte, counted from the header's end."""
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
        path=path, offset=start + begin, length=end - begin, dtype=FLOAT_NAMES.get(dtype, dtype)
    )
    return StoredTensor(name=name, shape=tuple(entry["shape"]), where=where)


def _damaged(path: Path, what: str) -> MistralcError:
    return MistralcError(
        f"{path} is not a whole safetensors file: {what}; expected a header that describes every "
        "byte of the file. Download the file again."
    )
