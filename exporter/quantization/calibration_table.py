"""The calibration table: written by `mistralc calibrate`, applied by `mistralc export`.

`TABLE/calibration.json` describes the table; `TABLE/calibration.safetensors` holds its numbers, by
canonical name:

    {group}.smoothing        [K]      input feature k is divided by it, the readers' columns
    multiplied {weight}_scale           [N, J]   scales other than those of the weight's own range
    {weight}_zero_point      [N, J]   with the scales, if the scheme has zero points {weight}
    [N, K]   codes other than the nearest (GPTQ): int8, or packed int4 {group}.input_scale      []
    of a rounded activation

Everything else is rounded to nearest.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from graphs.errors import MistralcError
from graphs.quant_scheme import Scheme

SCHEMA = 1
ELEMENT: Mapping[torch.dtype, str] = {
    torch.float32: "F32", torch.int8: "I8", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip
_FIELDS: Mapping[str, type] = {"precision": str, "method": str, "checkpoint": str, "data": dict,
                               "versions": dict, "schemes": dict, "facts": dict}  # fmt: skip
JSON_NAME, TENSORS_NAME = "calibration.json", "calibration.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationTable:
    """The calibrated numbers of one checkpoint.

    `schemes` has every quantized linear by canonical weight name; other linears are stored as
    floats. `data` describes the samples and their fingerprint. `facts` are measurements for the
    report; nothing else reads them.
    """

    precision: str
    method: str
    checkpoint: str  # fingerprint
    data: Mapping[str, Any]
    versions: Mapping[str, str]
    schemes: Mapping[str, Scheme]
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def require(self, fingerprint: str, where: str) -> None:
        """Raise MistralcError unless the table was made for the checkpoint of this fingerprint."""
        if fingerprint != self.checkpoint:
            raise MistralcError(
                f"The calibration table was made for a checkpoint of fingerprint "
                f"{self.checkpoint[:12]}…, and {where} has {fingerprint[:12]}…. Calibrate this "
                "checkpoint, or give the one that the table was made for."
            )

    @property
    def fingerprint(self) -> str:
        """SHA-256 over both files, which the manifest of a bundle records."""
        return hashlib.sha256(_json(self)).hexdigest()  # includes the digest of the other file

    def write(self, directory: Path) -> None:
        """Write both files into the existing `directory`; the same table gives the same bytes."""
        with (directory / TENSORS_NAME).open("wb") as file:
            for part in _serialized(self.tensors):
                file.write(part)
        (directory / JSON_NAME).write_bytes(_json(self))

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read what `write` wrote. Raises MistralcError if it is damaged or of another schema."""
        remedy = "Copy the table again from where it was made, or run `mistralc calibrate` again."
        path = directory / JSON_NAME
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            tensors = load_file(directory / TENSORS_NAME)
            _check(data, tensors)
            schemes = {name: Scheme.from_json(entry) for name, entry in data.pop("schemes").items()}
            return cls(schemes=schemes, tensors=tensors, **data)
        except (
            OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError,
            SafetensorError,
        ) as error:  # fmt: skip
            raise MistralcError(
                f"{directory} is not a calibration table ({error!s:.300}). {remedy}"
            ) from error


def _check(data: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Check `data` and remove what only reading needs. Raises ValueError or TypeError."""
    if data["schema"] != SCHEMA:
        raise ValueError(f"its schema is {data['schema']!r} ; expected {SCHEMA}")
    if data.pop("sha256") != _checksum(data):
        raise ValueError(f"{JSON_NAME} was changed after it was written")
    if data.pop("tensors_sha256") != _sha256(tensors):
        raise ValueError(f"{TENSORS_NAME} is not the one that was written with it")
    del data["schema"]
    for name, kind in _FIELDS.items():
        if not isinstance(data[name], kind):
            raise TypeError(f"{name} is of type {type(data[name]).__name__}")


def _json(table: CalibrationTable) -> bytes:
    data = {
        "schema": SCHEMA, "precision": table.precision, "method": table.method,
        "checkpoint": table.checkpoint, "data": dict(table.data),
        "versions": dict(table.versions),
        "schemes": {name: scheme.to_json() for name, scheme in sorted(table.schemes.items())},
        "facts": dict(table.facts), "tensors_sha256": _sha256(table.tensors),
    }  # fmt: skip
    text = json.dumps({**data, "sha256": _checksum(data)}, indent=1, sort_keys=True)
    return (text + "\n").encode()


def _checksum(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for part in _serialized(tensors):
        digest.update(part)
    return digest.hexdigest()


def _serialized(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file, one tensor at a time: a table of a 7B has 4 GB.

    Wide elements come first, so every tensor is aligned to its element size.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries, end = {}, 0
    for name in names:
        value = tensors[name]
        begin, end = end, end + value.numel() * value.element_size()
        entries[name] = {"dtype": ELEMENT[value.dtype], "shape": list(value.shape),
                         "data_offsets": [begin, end]}  # fmt: skip
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little") + header
    for name in names:
        flat = tensors[name].detach().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data
