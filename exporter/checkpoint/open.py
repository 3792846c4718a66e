"""Open a checkpoint of any format and read its weights, one at a time. Knows nothing about graphs.

Whatever the format, weights have Hugging Face's names, its half-split rotary order, and the shapes
of `ModelSpec.weight_shapes()`. Opening reads headers only, and checks them strictly: a tensor that
is missing, unexpected, of another shape or of an unreadable type is an error.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from exporter.checkpoint.adapters.merge import resized
from exporter.checkpoint.adapters.read import Adapter
from exporter.checkpoint.canonical import canonical, source_of, sources_of, text_model, unwrapped
from exporter.checkpoint.config_gguf import (
    FACTORS,
    LONG_FACTORS,
    SHORT_FACTORS,
    gguf_family,
    spec_from_gguf,
)
from exporter.checkpoint.config_hf import family_of, spec_from_hf
from exporter.checkpoint.config_mistral import spec_from_params
from exporter.checkpoint.gguf_model import read_model
from exporter.checkpoint.locate import find_weight_file, format_of, locate, weights_present
from exporter.checkpoint.quantized.methods import Quantization, quantization_of
from exporter.checkpoint.safetensors_file import read_file, read_index
from exporter.checkpoint.stored import ByteRange, StoredTensor, map_bytes
from exporter.checkpoint.weight_source import WeightSource
from exporter.families.family import Family, Format
from exporter.families.mistral import MISTRAL
from exporter.fields import Fields, read_json
from graphs.dtypes import FLOATS, Dtype
from graphs.errors import MistralcError
from graphs.spec import HEAD, ModelSpec

_MOST_NUMBERS = 4096  # rotary factors; published models have 64 at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint. It holds no file open, so there is nothing to close.

    `source` is `smollm2` or an absolute path, `path` the directory or GGUF file that it names.
    `stored` maps canonical names to where the weights come from, rows in canonical order. `method`
    is how the weights of a directory are quantized, None if they are not. `adapters` are merged in
    `stored`; `text` is where the tokenizer is read from.
    `left_out` names the parts of the checkpoint that are not of the text model.
    """

    spec: ModelSpec
    family: Family
    source: str
    path: Path
    format: Format
    stored: Mapping[str, WeightSource]
    method: str | None = None
    adapters: tuple[Adapter, ...] = ()
    text: Path
    left_out: tuple[str, ...] = ()

    @property
    def dtypes(self) -> Mapping[str, str]:
        """The stored type by canonical name: a float type, or a GGUF block type such as `Q4_1`."""
        return {name: source.dtype for name, source in self.stored.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """Return a weight in its stored float type, or dequantized to float32.

        Memory-mapped if the stored bytes are in canonical order, otherwise a copy.
        """
        return self.stored[name].read()

    def bytes_of(self, name: str) -> ByteRange | None:
        """Return the byte range that holds `tensor(name)` verbatim; None if it is computed."""
        return self.stored[name].verbatim

    def digest(self, name: str) -> str:
        """Return the SHA-256 of a weight's stored bytes, 64 hexadecimal digits."""
        digest = hashlib.sha256()
        for where in self.stored[name].ranges:
            digest.update(map_bytes(where).numpy().data)
        return digest.hexdigest()

    def fingerprint(self, digests: Mapping[str, str] | None = None) -> str:
        """Return a SHA-256 that identifies the model, 64 hexadecimal digits.

        It covers the spec, the format, and every weight's canonical name, shape, stored type and
        bytes. It does not cover the names and number of files, nor files without weights such as
        the tokenizer. Adapters are covered by their tensors and factors. `digests` are the results
        of `digest` by name, if they are known; otherwise all weights are read, two at a time, at
        about 1.5 GB/s per core.
        """
        names = sorted(self.stored)
        if digests is None:
            with ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
                digests = dict(zip(names, pool.map(self.digest, names), strict=True))
        tensors = [(n, self.stored[n].shape, self.stored[n].dtype, digests[n]) for n in names]
        facts: dict[str, Any] = {
            "format": self.format,
            "spec": self.spec.to_json(),
            "tensors": tensors,
        }
        if self.adapters:
            facts["adapters"] = [adapter.facts for adapter in self.adapters]
        text = json.dumps(facts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """What a configuration says of a checkpoint, before any weight is looked at.

    `dtype` is the weights' type, None if it gives none that we know; `quantization` says how they
    are quantized, None if they are not.
    """

    family: Family
    spec: ModelSpec
    dtype: Dtype | None = None
    quantization: Quantization | None = None

    @property
    def method(self) -> str | None:
        """The name of the quantization."""
        return None if self.quantization is None else self.quantization.method


def open_checkpoint(source: str | Path, lora: Sequence[str] = ()) -> Checkpoint:
    """Open a Hugging Face or Mistral directory, a `.gguf` file, or the name `smollm2`.

    A directory in both formats is read as Hugging Face's. The PEFT adapters `lora` (`ADAPTER` or
    `ADAPTER=WEIGHT`) are merged into it. Reads no weight, with one exception: an `lm_head.weight`
    stored next to a tied embedding is compared with it. Raises MistralcError naming the file, and
    the tensor or setting that is wrong.
    """
    place = locate(source, lora)
    path = place.path
    with _reading(path):
        kind = format_of(path)
        if kind == "gguf":
            family, spec, found = _read_gguf(path)
            declared = Declared(family=family, spec=spec)
        else:
            declared = _configured(path, kind)
            family, spec = declared.family, declared.spec
            weights = find_weight_file(path, kind)
            found = read_index(weights) if weights.suffix == ".json" else read_file(weights)
            found = unwrapped(found)
        sources, left_out = text_model(family, sources_of(found, kind, declared.quantization))
        if family.head_may_be_tied and HEAD not in sources:
            spec = replace(spec, tie_word_embeddings=True)
        spec, stored = canonical(family, spec, kind, path, sources, place.adapters)
    return Checkpoint(
        spec=spec, family=family, source=place.label, path=path, format=kind, stored=stored,
        method=declared.method, adapters=place.adapters,
        text=place.text, left_out=left_out,
    )  # fmt: skip


def read_declared(source: str | Path, lora: Sequence[str] = ()) -> Declared:
    """Read what a checkpoint's configuration says; unlike `open_checkpoint`, it is enough."""
    place = locate(source, lora)
    with _reading(place.path):
        kind = format_of(place.path)
        if kind == "gguf":
            family, spec, _ = _read_gguf(place.path)
            found = Declared(family=family, spec=spec)
        else:
            found = _configured(place.path, kind)
    return replace(found, spec=resized(found.spec, place.adapters))


def read_spec(source: str | Path, lora: Sequence[str] = ()) -> ModelSpec:
    """Read the spec of a checkpoint from its configuration."""
    return read_declared(source, lora).spec


def has_weights(source: str | Path) -> bool:
    """Whether every weight file is present; a directory may have only the configuration."""
    path = locate(source).path
    with _reading(path):
        kind = format_of(path)
        return kind == "gguf" or weights_present(path, kind)


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise MistralcError if a weight has NaN or infinite values, with their numbers."""
    least, most = tensor.aminmax()  # both are NaN if any value is; allocates nothing
    if bool(torch.isfinite(least) & torch.isfinite(most)):
        return
    nans, infinities = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    raise MistralcError(
        f"The weight {name} has {nans:,} NaN and {infinities:,} infinite values among "
        f"{tensor.numel():,}; expected finite numbers. The checkpoint is damaged, or its training "
        "diverged: download it again."
    )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise MistralcError for an error of the file system."""
    try:
        yield
    except OSError as error:
        raise MistralcError(
            f"The checkpoint {path} cannot be read ({error}); expected files that this user may "
            "read. Check the permissions and the disk."
        ) from error


def _read_gguf(path: Path) -> tuple[Family, ModelSpec, dict[str, StoredTensor]]:
    file = read_model(path)
    family = gguf_family(Fields(file.metadata, str(path)))
    tied = "output.weight" not in file.tensors
    names = [name for name in (FACTORS, SHORT_FACTORS, LONG_FACTORS) if name in file.tensors]
    numbers = {name: _numbers(file.tensors.pop(name)) for name in names}
    spec = spec_from_gguf(
        file.metadata, tied=tied, origin=str(path), numbers=numbers, tensors=file.tensors
    )
    return family, spec, file.tensors


def _numbers(tensor: StoredTensor) -> tuple[float, ...]:
    """Read a small tensor, such as rotary factors. Raises MistralcError if it holds no floats."""
    source = source_of(tensor, "gguf")
    if not source.readable or len(tensor.shape) != 1 or tensor.shape[0] > _MOST_NUMBERS:
        raise MistralcError(
            f"{source.path}: the tensor {tensor.name} has shape {list(tensor.shape)} and type "
            f"{source.dtype}; expected one float for each rotated pair. Download the file again."
        )
    return tuple(source.read().float().tolist())


def _configured(directory: Path, kind: Format) -> Declared:
    if kind == "mistral":
        params = read_json(directory / "params.json")
        spec = spec_from_params(params.values, params.origin)
        return Declared(family=MISTRAL, spec=spec, quantization=quantization_of(directory, params))
    config = read_json(directory / "config.json")
    named = config.values.get("dtype", config.values.get("torch_dtype"))
    return Declared(
        family=family_of(config),
        spec=spec_from_hf(config.values, config.origin),
        dtype=next((name for name in FLOATS if name == named), None),
        quantization=quantization_of(directory, config),
    )
