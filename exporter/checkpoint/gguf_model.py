"""A model in GGUF: one file, or several that llama.cpp's `gguf-split` made of it.

A part is named `NAME-00001-of-00003.gguf`; the first one has all metadata, and every part says its
number and the number of parts and tensors (`split.no`, `split.count`, `split.tensors.count`).
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from exporter.checkpoint.gguf_file import GgufFile, read_gguf
from exporter.checkpoint.stored import FLOAT_NAMES, StoredTensor
from graphs.errors import MistralcError

_NAMES = {ours: theirs for theirs, ours in FLOAT_NAMES.items()}
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_NO_MODEL = {
    "imatrix": "an importance matrix, which llama.cpp's quantizer reads",
    "adapter": "an adapter (LoRA), which changes a model and is none by itself",
    "mmproj": "the vision or audio encoder of a model",
    "clip": "the vision or audio encoder of a model",
}


def parts_of(path: Path) -> list[Path]:
    """Return the paths of all parts of the model that a file belongs to, whether they exist."""
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    stem, _, count = match.groups()
    names = (f"{stem}-{i:05}-of-{count}.gguf" for i in range(1, int(count) + 1))
    return [path.with_name(name) for name in names]


def read_model(path: Path) -> GgufFile:
    """Read the headers of all parts as one file, whose path is the first part's.

    Raises MistralcError for a GGUF file that holds no model, and for parts that are missing or do
    not belong together.
    """
    file = read_gguf(path)
    _check_model(file)
    count = file.metadata.get("split.count", 1)
    if type(count) is not int or count <= 1:
        return file
    paths = parts_of(path)
    if len(paths) != count:
        raise MistralcError(
            f"{path} is one of {count} parts of a model (`split.count`); expected a name like "
            f"NAME-00001-of-{count:05}.gguf, by which the others are found. Rename the parts as "
            "they were published."
        )
    for other in paths:
        if not other.is_file():
            raise MistralcError(
                f"{path} is one of {count} parts of a model, and {other.name} is not beside it; "
                "expected all parts in one directory. Download the missing one."
            )
    return _joined([file if other == path else read_gguf(other) for other in paths])


def _joined(files: list[GgufFile]) -> GgufFile:
    tensors: dict[str, StoredTensor] = {}
    for number, file in enumerate(files):
        told = file.metadata.get("split.no"), file.metadata.get("split.count")
        if told != (number, len(files)):
            raise MistralcError(
                f"{file.path} says that it is part {told[0]!r} of {told[1]!r} (`split.no`, "
                f"`split.count`); expected {number} of {len(files)}, counted from 0, as its name "
                "says. Download the parts again."
            )
        twice = tensors.keys() & file.tensors.keys()
        if twice:
            raise MistralcError(
                f"{file.path} has the tensor {min(twice)}, which an earlier part has too; expected "
                "the parts of one model. Download the parts again."
            )
        tensors |= file.tensors
    first = files[0]
    total = first.metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise MistralcError(
            f"{first.path} announces {total} tensors in all parts (`split.tensors.count`); they "
            f"have {len(tensors)}. Download the parts again."
        )
    return replace(first, tensors=tensors)


def _check_model(file: GgufFile) -> None:
    """Raise MistralcError if the file says that it holds something else than a model."""
    what = _NO_MODEL.get(kind_of(file.metadata))
    if what is not None:
        raise MistralcError(
            f"{file.path} holds {what}; expected the GGUF file of a language model. Give the "
            "model's own file."
        )


def kind_of(metadata: Mapping[str, Any]) -> str:
    """Return what a file says it holds: `model`, `adapter`, `imatrix`, `mmproj` and the like."""
    kind = metadata.get("general.type")
    if kind in (None, "model") and metadata.get("general.architecture") == "clip":
        return "clip"
    if kind is None and any(key.startswith("imatrix.") for key in metadata):
        return "imatrix"
    if kind is None and any(key.startswith("adapter.") for key in metadata):
        return "adapter"
    return str(kind or "model")


def describe_file(path: Path) -> str:
    """Say in a few words what a GGUF file holds: its type, or what it is if it is no model."""
    try:
        file = read_gguf(path)
    except (MistralcError, OSError):
        return "damaged"
    kind = kind_of(file.metadata)
    if kind in _NO_MODEL:
        return kind if kind != "clip" else "mmproj"
    sizes: dict[str, int] = {}
    for tensor in file.tensors.values():
        dtype = _NAMES.get(tensor.where.dtype, tensor.where.dtype)
        sizes[dtype] = sizes.get(dtype, 0) + tensor.where.length
    return f"mostly {max(sizes, key=lambda name: sizes[name])}" if sizes else "no weights"
