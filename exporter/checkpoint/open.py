"""Open a checkpoint of any format and read its weights, one at a time. Knows nothing about graphs.

Whatever the format, weights have Hugging Face's names, its half-split rotary order, and the shapes
of `ModelSpec.weight_shapes()`. Opening reads headers only, and checks them strictly: a tensor that
is missing, unexpected, of another shape or of an unreadable type is an error.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from exporter.checkpoint import weight_names
from exporter.checkpoint.adapters.merge import merged, resized
from exporter.checkpoint.adapters.read import Adapter
from exporter.checkpoint.config_gguf import spec_from_gguf
from exporter.checkpoint.config_hf import spec_from_hf
from exporter.checkpoint.config_mistral import spec_from_params
from exporter.checkpoint.fields import read_json
from exporter.checkpoint.gguf_file import is_readable, read_gguf
from exporter.checkpoint.locate import Format, find_weight_file, format_of, locate, weights_present
from exporter.checkpoint.quantized.gguf_blocks import block_source
from exporter.checkpoint.quantized.methods import Quantization, quantization_of
from exporter.checkpoint.safetensors_file import read_file, read_index
from exporter.checkpoint.stored import TORCH_FLOATS, ByteRange, StoredTensor, map_bytes
from exporter.checkpoint.weight_source import WeightSource, float_source, unreadable_source
from graphs.dtypes import FLOATS, Dtype
from graphs.errors import MistralcError
from graphs.spec import ModelSpec

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Old versions of transformers saved the rotary frequencies, which follow from the configuration.
_INVERSE_FREQUENCIES = r"(.+\.)?rotary_emb\.inv_freq"
# Scales of a quantized KV cache; ours is in floats.
_CACHE_SCALES = r".+\.(self_attn|attention)\.(\w_proj\.)?[kqv]_(scale|zero_point)"
_IGNORED = re.compile(f"{_INVERSE_FREQUENCIES}|{_CACHE_SCALES}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint. It holds no file open, so there is nothing to close.

    `source` is `smollm2` or an absolute path, `path` the directory or GGUF file that it names.
    `stored` maps canonical names to where the weights come from, rows in canonical order. `method`
    is how the weights of a directory are quantized, None if they are not. `adapters` are merged in
    `stored`; `text` is where the tokenizer is read from.
    """

    spec: ModelSpec
    source: str
    path: Path
    format: Format
    stored: Mapping[str, WeightSource]
    method: str | None = None
    adapters: tuple[Adapter, ...] = ()
    text: Path

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
        quantization = None
        if kind == "gguf":
            spec, found = _read_gguf(path)
        else:
            (spec, quantization), weights = _configured(path, kind), find_weight_file(path, kind)
            found = read_index(weights) if weights.suffix == ".json" else read_file(weights)
        stored = _canonical(spec, kind, path, _sources(found, kind, quantization))
        if place.adapters:
            stored = merged(stored, place.adapters, tied=spec.tie_word_embeddings)
            spec = resized(spec, place.adapters)
            _check_shapes(spec, stored)
    method = None if quantization is None else quantization.method
    return Checkpoint(
        spec=spec, source=place.label, path=path, format=kind, stored=stored, method=method,
        adapters=place.adapters, text=place.text,
    )  # fmt: skip


def read_spec(source: str | Path, lora: Sequence[str] = ()) -> ModelSpec:
    """Read the spec of a checkpoint; unlike `open_checkpoint`, the configuration is enough."""
    place = locate(source, lora)
    with _reading(place.path):
        kind = format_of(place.path)
        spec = _read_gguf(place.path)[0] if kind == "gguf" else _configured(place.path, kind)[0]
    return resized(spec, place.adapters)


def has_weights(source: str | Path) -> bool:
    """Whether every weight file is present; a directory may have only the configuration."""
    path = locate(source).path
    with _reading(path):
        kind = format_of(path)
        return kind == "gguf" or weights_present(path, kind)


def declared_type(source: str | Path) -> Dtype | None:
    """Read the weights' type from the configuration; None if it gives none that we know."""
    path = locate(source).path
    with _reading(path):
        if format_of(path) != "huggingface":
            return None
        values = read_json(path / "config.json").values
    declared = values.get("dtype", values.get("torch_dtype"))
    return next((name for name in FLOATS if name == declared), None)


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


def _read_gguf(path: Path) -> tuple[ModelSpec, dict[str, StoredTensor]]:
    file = read_gguf(path)
    tied = "output.weight" not in file.tensors
    return spec_from_gguf(file.metadata, tied=tied, origin=str(path)), file.tensors


def _configured(directory: Path, kind: Format) -> tuple[ModelSpec, Quantization | None]:
    """Read the spec, and how the weights are quantized."""
    config = read_json(directory / ("params.json" if kind == "mistral" else "config.json"))
    read = spec_from_params if kind == "mistral" else spec_from_hf
    return read(config.values, config.origin), quantization_of(directory, config)


def _canonical(
    spec: ModelSpec, kind: Format, path: Path, found: Mapping[str, WeightSource]
) -> dict[str, WeightSource]:
    """Return the weights by canonical name, after checking that they are exactly the spec's."""
    stored: dict[str, WeightSource] = {}
    names = {name: _stored_name(name, kind) for name in spec.weight_shapes()}
    for name, shape in spec.weight_shapes().items():
        source = found.get(names[name])
        if source is None:
            raise _missing(names, found, name, path)
        _check_source(source, shape, kind)
        heads = None if kind == "huggingface" else weight_names.rotated_heads(spec, name)
        stored[name] = source if heads is None else source.half_split(heads)
    head = found.get(_stored_name(_HEAD, kind))
    for stray in found.values():
        if stray.name in names.values() or _IGNORED.fullmatch(stray.name) or _adds_nothing(stray):
            continue
        if spec.tie_word_embeddings and stray is head:
            _check_tied(found[names[_EMBEDDING]], stray)
            continue
        raise _unexpected(stray)
    return stored


def _check_shapes(spec: ModelSpec, stored: Mapping[str, WeightSource]) -> None:
    """Raise MistralcError if an adapter left weights of shapes that do not belong together."""
    for name, shape in spec.weight_shapes().items():
        if stored[name].shape != shape:
            raise MistralcError(
                f"With the adapters, {name} has shape {list(stored[name].shape)}; expected "
                f"{list(shape)}, as the other weights have it. Use the base model that the "
                "adapter was trained on."
            )


def _adds_nothing(stray: WeightSource) -> bool:
    """Whether a tensor is a bias of zeros: AutoGPTQ writes one for every linear."""
    return stray.name.endswith(".bias") and stray.readable and not stray.read().any()


def _sources(
    found: Mapping[str, StoredTensor], kind: Format, quantization: Quantization | None
) -> dict[str, WeightSource]:
    """Return where every weight comes from, by the name that it has in the files as floats."""
    made = {} if quantization is None else quantization.sources(found)
    owners = {name.removesuffix("weight") for name in made}
    result = {}
    for name, tensor in found.items():
        parts = [name[: at + 1] for at, letter in enumerate(name) if letter == "."]
        if any(owner in owners for owner in parts) and not name.endswith(".bias"):
            continue  # a part of a quantized weight
        result[name] = _source(tensor, kind)
    return result | made


def _source(tensor: StoredTensor, kind: Format) -> WeightSource:
    """Return where one stored tensor comes from; one that holds no weights is not an error yet."""
    if tensor.where.dtype in TORCH_FLOATS:
        return float_source(tensor)
    if kind == "gguf" and is_readable(tensor.where.dtype):
        return block_source(tensor)
    return unreadable_source(tensor)


def _stored_name(name: str, kind: Format) -> str:
    if kind == "mistral":
        return weight_names.mistral_name(name)
    return weight_names.gguf_name(name) if kind == "gguf" else name


def _missing(
    names: Mapping[str, str], found: Mapping[str, WeightSource], name: str, path: Path
) -> MistralcError:
    count = sum(stored_name not in found for stored_name in names.values())
    others = f" and {count - 1} more" if count > 1 else ""
    advice = "Use the configuration and weights of one checkpoint, or download it again."
    if name == _HEAD:
        advice = (
            "If the output layer is the embedding, the configuration has to say so "
            "(tie_word_embeddings or tied_embeddings: true); otherwise download the checkpoint "
            "again."
        )
    return MistralcError(
        f"{path} lacks the tensor {names[name]}{others}; expected every weight that the "
        f"configuration describes. {advice}"
    )


def _unexpected(stray: WeightSource) -> MistralcError:
    advice = (
        "Use the configuration and weights of one dense checkpoint without biases, adapters or "
        "quantization."
    )
    if stray.name == "rope_freqs.weight":  # Llama 3.1's rotary scaling in GGUF
        advice = "It scales the rotary embedding: use the Hugging Face checkpoint of this model."
    return MistralcError(
        f"{stray.path} has a tensor {stray.name} of shape {list(stray.shape)}; expected only "
        f"the weights that the configuration describes. {advice}"
    )


def _check_source(source: WeightSource, shape: tuple[int, ...], kind: Format) -> None:
    if source.shape != shape:
        raise MistralcError(
            f"{source.path}: the tensor {source.name} has shape {list(source.shape)}; "
            f"expected {list(shape)} from the configuration. Use the configuration and weights of "
            "one checkpoint."
        )
    if source.readable:
        return
    quantized = " or a quantization that the gguf package can read" if kind == "gguf" else ""
    raise MistralcError(
        f"{source.path}: the tensor {source.name} is of type {source.dtype}; expected one of "
        f"{', '.join(TORCH_FLOATS)}{quantized}. Use the unquantized checkpoint, and quantize with "
        "--precision."
    )


def _check_tied(embedding: WeightSource, head: WeightSource) -> None:
    """Raise unless a stored output layer equals the embedding that it is tied to, byte for byte."""
    same = (embedding.shape, embedding.dtype) == (head.shape, head.dtype)
    pairs = zip(embedding.ranges, head.ranges, strict=False)
    if not same or not all(torch.equal(map_bytes(a), map_bytes(b)) for a, b in pairs):
        raise MistralcError(
            f"{head.path}: the tensor {head.name} differs from {embedding.name}, although "
            f"the configuration says that they are tied; expected the same bytes, or no "
            f"{head.name}. Set tie_word_embeddings to false if the output layer was trained on its "
            "own; otherwise remove the tensor."
        )
