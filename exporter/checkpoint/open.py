"""A checkpoint on disk, one weight at a time by its canonical name. Knows nothing about graphs.

Whatever the source, the weights are seen under Hugging Face's names, in its half-split rotary
order, with the shapes of `ModelSpec.weight_shapes()`. Opening reads headers only and is strict
both ways: a tensor too few, too many, of another shape or of an unreadable type is an error.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from exporter.checkpoint import weight_names
from exporter.checkpoint.config_gguf import spec_from_gguf
from exporter.checkpoint.config_hf import spec_from_hf
from exporter.checkpoint.config_mistral import spec_from_params
from exporter.checkpoint.fields import read_json
from exporter.checkpoint.gguf_file import dequantize, is_readable, read_gguf
from exporter.checkpoint.locate import Format, format_of, locate, weight_file, weights_present
from exporter.checkpoint.safetensors_file import read_file, read_index
from exporter.checkpoint.stored import FLOATS, ByteRange, StoredTensor, map_bytes, map_tensor
from graphs.dtypes import FLOATS as FLOAT_NAMES
from graphs.dtypes import Dtype
from graphs.errors import MistralcError
from graphs.spec import ModelSpec

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Old transformers versions saved the rotary frequencies, which are computed from the config.
_IGNORED = re.compile(r"(.+\.)?rotary_emb\.inv_freq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint. It holds no file open, so there is nothing to close.

    `source` is `smollm2` or an absolute path; `path` is the directory or GGUF file behind it;
    `stored` says for every canonical name where its bytes lie, in the source's own order.
    """

    spec: ModelSpec
    source: str
    path: Path
    format: Format
    stored: Mapping[str, StoredTensor]

    @property
    def dtypes(self) -> Mapping[str, str]:
        """Stored type by canonical name: a float dtype, or a GGUF block type such as `Q4_1`."""
        return {name: tensor.where.dtype for name, tensor in self.stored.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """One weight by canonical name, in its stored float dtype; float32 if it was quantized.

        Memory-mapped where the bytes are canonical as they lie, else a tensor of its own.
        """
        stored = self.stored[name]
        weight = map_tensor(stored) if stored.where.dtype in FLOATS else dequantize(stored)
        heads = self.interleaved_heads(name)
        return weight if heads is None else weight_names.to_half_split(weight, heads)

    def bytes_of(self, name: str) -> ByteRange | None:
        """Where the bytes of `tensor(name)` lie verbatim; None if they are computed."""
        where = self.stored[name].where
        verbatim = where.dtype in FLOATS and self.interleaved_heads(name) is None
        return where if verbatim else None

    def digest(self, name: str) -> str:
        """SHA-256 of one weight's bytes as they are stored: 64 hexadecimal digits."""
        return hashlib.sha256(map_bytes(self.stored[name].where).numpy().data).hexdigest()

    def fingerprint(self, digests: Mapping[str, str] | None = None) -> str:
        """SHA-256 over what the checkpoint computes: 64 hexadecimal digits.

        Covered are the spec, the format, and every weight's canonical name, shape, stored type
        and bytes. Not covered are the names and number of files, and what has no weights, such as
        the tokenizer. `digests` may hold what `digest` gives for every name; else all weights are
        read here, two at a time: about 1.5 GB/s a core.
        """
        names = sorted(self.stored)
        if digests is None:
            with ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
                digests = dict(zip(names, pool.map(self.digest, names), strict=True))
        tensors = [(n, self.stored[n].shape, self.stored[n].where.dtype, digests[n]) for n in names]
        text = json.dumps(
            {"format": self.format, "spec": self.spec.to_json(), "tensors": tensors},
            sort_keys=True,
        )
        return hashlib.sha256(text.encode()).hexdigest()

    def interleaved_heads(self, name: str) -> int | None:
        """How many heads the rows of this weight are, if they lie in interleaved rotary order."""
        return None if self.format == "huggingface" else weight_names.rotated_heads(self.spec, name)


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a Hugging Face or Mistral directory, a `.gguf` file, or the name `smollm2`.

    A directory with both layouts is read as Hugging Face's. Reads no weight, with one exception:
    an `lm_head.weight` kept beside a tied embedding is compared with it. Raises MistralcError
    naming the file and the tensor or setting that is not as expected.
    """
    path, label = locate(source)
    with _readable(path):
        kind = format_of(path)
        if kind == "gguf":
            spec, found = _read_gguf(path)
        else:
            spec, weights = _configured(path, kind), weight_file(path, kind)
            found = read_index(weights) if weights.suffix == ".json" else read_file(weights)
        stored = _canonical(spec, kind, path, found)
    return Checkpoint(spec=spec, source=label, path=path, format=kind, stored=stored)


def read_spec(source: str | Path) -> ModelSpec:
    """The spec of what `open_checkpoint` takes, or of a directory with only its configuration."""
    path, _ = locate(source)
    with _readable(path):
        kind = format_of(path)
        return _read_gguf(path)[0] if kind == "gguf" else _configured(path, kind)


def has_weights(source: str | Path) -> bool:
    """Whether every weight file is there; a directory may hold only the configuration so far."""
    path, _ = locate(source)
    with _readable(path):
        kind = format_of(path)
        return kind == "gguf" or weights_present(path, kind)


def declared_type(source: str | Path) -> Dtype | None:
    """The type that the configuration gives for the weights; None if it gives none that we know."""
    path, _ = locate(source)
    with _readable(path):
        if format_of(path) != "huggingface":
            return None
        values = read_json(path / "config.json").values
    declared = values.get("dtype", values.get("torch_dtype"))
    return next((name for name in FLOAT_NAMES if name == declared), None)


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise MistralcError naming the weight and counting its NaN and infinite values, if any."""
    least, most = tensor.aminmax()  # both are NaN if any value is; no temporary tensor is made
    if bool(torch.isfinite(least) & torch.isfinite(most)):
        return
    nans, infinities = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    raise MistralcError(
        f"The weight {name} has {nans:,} NaN and {infinities:,} infinite values among "
        f"{tensor.numel():,}; finite numbers are expected. The checkpoint is damaged or its "
        "training diverged: fetch it again."
    )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into an error of ours."""
    try:
        yield
    except OSError as error:
        raise MistralcError(
            f"The checkpoint {path} cannot be read ({error}); files that this user may read are "
            "expected. Check the permissions and the disk."
        ) from error


def _read_gguf(path: Path) -> tuple[ModelSpec, dict[str, StoredTensor]]:
    file = read_gguf(path)
    tied = "output.weight" not in file.tensors
    return spec_from_gguf(file.metadata, tied=tied, origin=str(path)), file.tensors


def _configured(directory: Path, kind: Format) -> ModelSpec:
    if kind == "mistral":
        params = read_json(directory / "params.json")
        return spec_from_params(params.values, params.origin)
    config = read_json(directory / "config.json")
    return spec_from_hf(config.values, config.origin)


def _canonical(
    spec: ModelSpec, kind: Format, path: Path, found: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """The tensors by canonical name, once they are exactly those of the spec."""
    stored: dict[str, StoredTensor] = {}
    own = {name: _own_name(name, kind) for name in spec.weight_shapes()}
    for name, shape in spec.weight_shapes().items():
        tensor = found.get(own[name])
        if tensor is None:
            raise _missing(own, found, name, path)
        _check_tensor(tensor, shape, kind)
        stored[name] = tensor
    head = found.get(_own_name(_HEAD, kind))
    for stray in found.values():
        if stray.name in own.values() or _IGNORED.fullmatch(stray.name):
            continue
        if spec.tie_word_embeddings and stray is head:
            _check_tied(stored[_EMBEDDING], stray)
            continue
        raise _unexpected(stray)
    return stored


def _own_name(name: str, kind: Format) -> str:
    if kind == "mistral":
        return weight_names.mistral_name(name)
    return weight_names.gguf_name(name) if kind == "gguf" else name


def _missing(
    own: Mapping[str, str], found: Mapping[str, StoredTensor], name: str, path: Path
) -> MistralcError:
    count = sum(stored_name not in found for stored_name in own.values())
    others = f" and {count - 1} more" if count > 1 else ""
    advice = "Use the configuration and weights of one checkpoint, or fetch it again."
    if name == _HEAD:
        advice = (
            "If the output layer is the embedding, the configuration has to say so "
            "(tie_word_embeddings or tied_embeddings: true); else fetch the checkpoint again."
        )
    return MistralcError(
        f"{path} lacks the tensor {own[name]}{others}; every weight that the configuration calls "
        f"for is expected. {advice}"
    )


def _unexpected(stray: StoredTensor) -> MistralcError:
    advice = (
        "Use the configuration and weights of one dense checkpoint without biases, adapters or "
        "quantization."
    )
    if stray.name == "rope_freqs.weight":  # how GGUF keeps Llama 3.1's rotary scaling
        advice = "It scales the rotary embedding: use the Hugging Face checkpoint of this model."
    return MistralcError(
        f"{stray.where.path} holds a tensor {stray.name} of shape {list(stray.shape)}; only the "
        f"weights that the configuration calls for are expected. {advice}"
    )


def _check_tensor(tensor: StoredTensor, shape: tuple[int, ...], kind: Format) -> None:
    if tensor.shape != shape:
        raise MistralcError(
            f"{tensor.where.path}: the tensor {tensor.name} has shape {list(tensor.shape)}; "
            f"{list(shape)} is expected from the configuration. Use the configuration and "
            "weights of one checkpoint."
        )
    dtype = tensor.where.dtype
    if dtype in FLOATS or (kind == "gguf" and is_readable(dtype)):
        return
    quantized = " or a quantization that the gguf package can read" if kind == "gguf" else ""
    raise MistralcError(
        f"{tensor.where.path}: the tensor {tensor.name} is of type {dtype}; "
        f"{', '.join(FLOATS)}{quantized} is expected. Use the unquantized checkpoint; mistralc "
        "quantizes with --precision."
    )


def _check_tied(embedding: StoredTensor, head: StoredTensor) -> None:
    """Raise unless a kept output layer is, byte for byte, the embedding it is tied to."""
    same = (embedding.shape, embedding.where.dtype) == (head.shape, head.where.dtype)
    if not same or not torch.equal(map_bytes(embedding.where), map_bytes(head.where)):
        raise MistralcError(
            f"{head.where.path}: the tensor {head.name} differs from {embedding.name}, although "
            "the configuration says that they are tied; the same bytes, or no "
            f"{head.name}, are expected. Set tie_word_embeddings to false if the output layer "
            "was trained on its own, else take the tensor out."
        )
