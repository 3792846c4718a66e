"""The manifest: a bundle's description of itself.

It uses plain data and the standard library only, because both the build host and the production
host read it. It holds no time, no host name and no absolute path: the same input gives the same
bytes. Its last field is the SHA-256 of all others. It is accepted only in exactly the form in which
it is written, so every changed bit is noticed and its bytes can be signed.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self, get_args

from graphs.build import Build, Storage, WindowSource
from graphs.contract import GraphContract
from graphs.dtypes import FLOATS, Dtype
from graphs.errors import MistralcError
from graphs.precisions import PRECISIONS, Precision
from graphs.quant_scheme import Scheme
from graphs.spec import ModelSpec, RingSpec
from graphs.targets import TARGETS, CodeLayout, Target

SCHEMA = 1
FILE_NAME = "manifest.json"
SIGNATURE = "manifest.sig"  # signs the bytes of the manifest, which therefore cannot list it
CHECKSUM = "manifest_sha256"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """Size in bytes and SHA-256, in lower-case hexadecimal, of one file of the bundle."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything that a host must know before it loads a bundle.

    `files` has every file except the manifest and its signature, by path relative to the bundle.
    `window_source` says whether the sliding window is the checkpoint's or the user's choice.
    """

    schema: int = SCHEMA
    target: str
    precision: str
    activation: Dtype
    model: ModelSpec
    ring: RingSpec
    window_source: WindowSource
    checkpoint: Mapping[str, str]  # name, format, fingerprint
    versions: Mapping[str, str]  # of mistralc and of the libraries that made the bundle
    passes: Mapping[str, int] = field(default_factory=dict)  # how often each graph pass fired
    quantization: Mapping[str, Any] | None = None  # schemes by weight, and what decided them
    golden: Sequence[
        Mapping[str, Any]
    ] = ()  # texts and clear preferences: runtime/decoding/golden.py
    verification: Mapping[str, Any] | None = None
    text: Mapping[str, Any] | None = None  # what the tokenizer was compared with, and notes on it
    engine: Mapping[str, Any] | None = None  # the audit of a TensorRT plan
    files: Mapping[str, FileEntry]

    @property
    def known_target(self) -> Target:
        """The facts of the bundle's target. Raises MistralcError if this version has no such."""
        found = TARGETS.get(self.target)
        if found is None:
            raise MistralcError(
                f"The bundle was built for the target {self.target!r:.40}; this version of "
                f"mistralc knows {', '.join(TARGETS)}. Install the version that wrote the bundle, "
                "or export the checkpoint again."
            )
        return found

    @property
    def known_precision(self) -> Precision:
        """The facts of the bundle's precision. Raises MistralcError if this version has no such."""
        found = PRECISIONS.get(self.precision)
        if found is None:
            raise MistralcError(
                f"The bundle is of the precision {self.precision!r:.40}; this version of mistralc "
                f"knows {', '.join(PRECISIONS)}. Install the version that wrote the bundle, or "
                "export the checkpoint again."
            )
        return found

    @property
    def storage(self) -> Storage:
        """How each weight is stored. Raises MistralcError if the record is not one of ours."""
        record = self.quantization or {}
        layouts = record.get("layouts", {})
        unknown = set(layouts.values()) - set(get_args(CodeLayout))
        if unknown:
            raise MistralcError(
                f"The bundle's codes are laid out as {sorted(unknown)[0]!r:.40}; this version of "
                f"mistralc reads {', '.join(get_args(CodeLayout))}. Export the checkpoint again."
            )
        schemes = record.get("schemes", {})
        return Storage(
            schemes={name: Scheme.from_json(entry) for name, entry in schemes.items()},
            layouts=layouts,
            copied=tuple(record.get("repacked", ())),
        )

    @property
    def build(self) -> Build:
        """What was decided before the bundle was written."""
        return Build(
            target=self.known_target, precision=self.known_precision, contract=self.contract,
            storage=self.storage, window_source=self.window_source,
            batch_invariant=self.batch_invariant,
        )  # fmt: skip

    @property
    def file_bytes(self) -> int:
        """Bytes of all files that the manifest lists."""
        return sum(entry.size for entry in self.files.values())

    @property
    def contract(self) -> GraphContract:
        """What the bundle's graph takes and returns."""
        return GraphContract(spec=self.model, ring=self.ring, activation=self.activation)

    @property
    def batch_invariant(self) -> bool:
        """Whether logits have the same bits for any batch and step size."""
        return "pad_query" in self.passes

    def to_text(self) -> str:
        """Return the manifest as the JSON text that `from_text` takes."""
        data = asdict(self) | {"model": self.model.to_json()}
        if self.text is None:  # as in bundles from before it was recorded
            del data["text"]
        return json.dumps(data | {CHECKSUM: _checksum(data)}, indent=2) + "\n"

    @classmethod
    def from_text(cls, text: str, where: str) -> Self:
        """Read `to_text`'s form; `where` names the file in errors.

        Raises MistralcError if it is damaged, or of a schema that this version does not know.
        """
        remedy = "Copy the bundle again from where it was built, or export it again."
        try:
            data = json.loads(text)
            schema = data["schema"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise MistralcError(
                f"{where} is not a bundle's manifest ({error!s:.200}). {remedy}"
            ) from error
        if type(schema) is not int or schema != SCHEMA:
            age = "a newer" if isinstance(schema, int) and schema > SCHEMA else "another"
            raise MistralcError(
                f"{where} has schema {schema!r:.40} and this mistralc reads schema {SCHEMA}: the "
                f"bundle was written by {age} version. Install the version of mistralc that wrote "
                "it, or export the checkpoint again with this one."
            )
        if data.pop(CHECKSUM, None) != _checksum(data):
            raise MistralcError(
                f"{where} was changed after the bundle was written: its {CHECKSUM} is not that "
                f"of its contents. {remedy}"
            )
        try:
            _check_types(data)
            data["model"] = ModelSpec.from_json(data["model"])
            data["ring"] = RingSpec(**data["ring"])
            data["files"] = {name: FileEntry(**entry) for name, entry in data["files"].items()}
            manifest = cls(**data)
            written = manifest.to_text()
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise MistralcError(
                f"{where} does not have the fields of schema {SCHEMA} ({error!s:.200}). {remedy}"
            ) from error
        if written != text:
            raise MistralcError(
                f"{where} was changed after the bundle was written: its fields are the same "
                f"but their form is not, or a field is repeated. {remedy}"
            )
        return manifest


_TEXT_FIELDS = ("target", "precision", "activation", "window_source")
_RECORDS = ("quantization", "verification", "text", "engine")
"""Objects, or null: not done, or not for this target."""


def _check_types(data: Mapping[str, Any]) -> None:
    """Raise TypeError for the first field that is not of the type its readers expect."""
    for name in _TEXT_FIELDS:
        _need(isinstance(data[name], str), name, "text")
    _need(data["activation"] in FLOATS, "activation", f"one of {', '.join(FLOATS)}")
    for name in ("checkpoint", "versions"):
        texts = isinstance(data[name], dict) and all(
            isinstance(v, str) for v in data[name].values()
        )
        _need(texts, name, "an object of texts")
    _need({"name", "format"} <= data["checkpoint"].keys(), "checkpoint", "a name and a format")
    for name in ("model", "ring", "files", "passes"):
        _need(isinstance(data[name], dict), name, "an object")
    for name in _RECORDS:
        _need(isinstance(data.get(name), dict | None), name, "an object or null")
    _need(isinstance(data["golden"], list), "golden", "a list")
    for name, entry in data["files"].items():
        _need(
            isinstance(entry, dict) and _is_entry(**entry), f"files, {name:.80}", "size and SHA-256"
        )


def _is_entry(size: object = None, sha256: object = None) -> bool:
    digest = isinstance(sha256, str) and re.fullmatch(r"[0-9a-f]{64}", sha256)
    return type(size) is int and size >= 0 and bool(digest)


def _need(good: bool, name: str, expected: str) -> None:
    if not good:
        raise TypeError(f"{name} is not {expected}")


def _checksum(data: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's fields, independent of the form of their JSON."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def read_manifest(bundle: Path) -> Manifest:
    """Read the manifest of the bundle in directory `bundle`; no other file is checked."""
    return parse_manifest(manifest_bytes(bundle), bundle)


def manifest_bytes(bundle: Path) -> bytes:
    """Read the bytes of the manifest's file. Raises MistralcError if there is none."""
    path = bundle / FILE_NAME
    if not bundle.exists():
        raise MistralcError(
            f"There is no bundle at {bundle}. Make one with `mistralc export CHECKPOINT -o "
            f"{bundle}`, or check the path."
        )
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MistralcError(
            f"{bundle} is not a bundle: it has no {FILE_NAME}. A directory that `mistralc export` "
            "wrote is expected; for a checkpoint, run `mistralc export` on it first."
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def parse_manifest(data: bytes, bundle: Path) -> Manifest:
    """Parse what `manifest_bytes` returned. Raises MistralcError as `Manifest.from_text` does."""
    path = bundle / FILE_NAME
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _unreadable(path, error) from error
    return Manifest.from_text(text, str(path))


def _unreadable(path: Path, error: Exception) -> MistralcError:
    return MistralcError(
        f"{path} could not be read ({error}). Copy the bundle again from where it was built."
    )
