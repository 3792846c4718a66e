"""Find every canonical weight among a checkpoint's stored tensors, and nothing else there.

Canonical weights have Hugging Face's names, its half-split rotary order, and the shapes of
`ModelSpec.weight_shapes()`. The family says where each is stored.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from exporter.checkpoint.adapters.merge import merged, resized
from exporter.checkpoint.adapters.read import Adapter
from exporter.checkpoint.gguf_file import is_readable
from exporter.checkpoint.quantized.gguf_blocks import block_source
from exporter.checkpoint.quantized.methods import Quantization
from exporter.checkpoint.stored import TORCH_FLOATS, StoredTensor, map_bytes
from exporter.checkpoint.weight_source import WeightSource, float_source, unreadable_source
from exporter.families.family import Family, Format, StoredAs
from graphs.errors import MistralcError
from graphs.spec import EMBEDDING, HEAD, ModelSpec

# Old versions of transformers saved the rotary frequencies, which follow from the configuration.
_INVERSE_FREQUENCIES = r"(.+\.)?rotary_emb\.inv_freq"
# Scales of a quantized KV cache; ours is in floats.
_CACHE_SCALES = r".+\.(self_attn|attention)\.(\w_proj\.)?[kqv]_(scale|zero_point)"
_IGNORED = re.compile(f"{_INVERSE_FREQUENCIES}|{_CACHE_SCALES}")
# What peft, torch.compile and data-parallel training wrap a model in.
_WRAPPERS = ("base_model.model.", "_orig_mod.", "module.", "_fsdp_wrapped_module.")

Sources = Mapping[str, WeightSource]


def unwrapped(found: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Strip the prefixes of training's wrappers from the names, if all names begin with them."""
    names = dict(found)
    while prefix := next((p for p in _WRAPPERS if all(n.startswith(p) for n in names)), None):
        if not names:
            break
        names = {name.removeprefix(prefix): tensor for name, tensor in names.items()}
    return names


def sources_of(
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
        result[name] = source_of(tensor, kind)
    return result | made


def source_of(tensor: StoredTensor, kind: Format) -> WeightSource:
    """Return where one stored tensor comes from; one that holds no weights is not an error yet."""
    if tensor.where.dtype in TORCH_FLOATS:
        return float_source(tensor)
    if kind == "gguf" and is_readable(tensor.where.dtype):
        return block_source(tensor)
    return unreadable_source(tensor)


def text_model(family: Family, found: Sources) -> tuple[dict[str, WeightSource], tuple[str, ...]]:
    """Return the tensors of the text model by the names they have there, and what is left out."""
    sources, others = {}, set()
    for name, source in found.items():
        text_name = family.text_name(name)
        if text_name is None:
            others.add(next(one for one in family.left_out if name.startswith(one)).rstrip("."))
        else:
            sources[text_name] = source
    return sources, tuple(sorted(others))


def canonical(
    family: Family, spec: ModelSpec, kind: Format, path: Path, found: Sources,
    adapters: Sequence[Adapter],
) -> tuple[ModelSpec, dict[str, WeightSource]]:  # fmt: skip
    """Return the weights by canonical name, with the adapters merged, and the spec they then have.

    Raises MistralcError unless the tensors of `path` are exactly the spec's. An adapter names
    weights as a Hugging Face checkpoint does, fused ones among them.
    """
    if spec.tie_word_embeddings:
        found = _without_tied_head(family, spec, kind, found)
    if adapters and kind == "huggingface":
        found = merged(found, adapters, tied=spec.tie_word_embeddings)
        spec = resized(spec, adapters)
    stored = _canonical(family, spec, kind, path, found)
    if adapters and kind != "huggingface":
        stored = merged(stored, adapters, tied=spec.tie_word_embeddings)
        spec = resized(spec, adapters)
        for name, shape in spec.weight_shapes().items():
            _check_source(stored[name], shape, kind)
    return spec, stored


def _without_tied_head(
    family: Family, spec: ModelSpec, kind: Format, found: Sources
) -> dict[str, WeightSource]:
    """Leave out an output layer that is stored although it is tied, after comparing them."""
    embedding, head = (family.tensors(spec, kind, name).name for name in (EMBEDDING, HEAD))
    if embedding in found and head in found:
        _check_tied(found[embedding], found[head])
    return {name: source for name, source in found.items() if name != head}


def _canonical(
    family: Family, spec: ModelSpec, kind: Format, path: Path, found: Sources
) -> dict[str, WeightSource]:
    """Return the weights by canonical name, after checking that they are exactly the spec's."""
    shapes = spec.weight_shapes()
    places = {name: family.tensors(spec, kind, name) for name in shapes}
    names = {name: place.name for name, place in places.items()}
    whole = _stored_shapes(places, shapes)
    stored: dict[str, WeightSource] = {}
    for name, place in places.items():
        source = found.get(place.name)
        if source is None:
            raise _missing(names, found, name, path)
        _check_source(source, whole[place.name], kind)
        stored[name] = _part(source, place)
    for name, stray in found.items():
        if not (name in whole or _IGNORED.fullmatch(name) or _adds_nothing(stray)):
            raise _unexpected(stray)
    return stored


def _adds_nothing(stray: WeightSource) -> bool:
    """Whether a tensor is a bias of zeros: AutoGPTQ writes one for every linear."""
    return stray.name.endswith(".bias") and stray.readable and not stray.read().any()


def _stored_shapes(
    places: Mapping[str, StoredAs], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every stored tensor; a fused one ends where its last part does."""
    whole: dict[str, tuple[int, ...]] = {}
    for name, place in places.items():
        rows = shapes[name][0] if place.rows is None else place.rows[1]
        most = max(rows, whole.get(place.name, (0,))[0])
        whole[place.name] = (most, *shapes[name][1:])
    return whole


def _part(source: WeightSource, place: StoredAs) -> WeightSource:
    """Return the source of the canonical weight that a place in a stored tensor holds."""
    if place.rows is not None:
        source = source.rows(*place.rows)
    if place.interleaved_heads is not None:
        source = source.half_split(place.interleaved_heads)
    return source.changed(_plus_one) if place.add_one else source


def _plus_one(values: torch.Tensor) -> torch.Tensor:
    return values + 1


def _missing(
    names: Mapping[str, str], found: Mapping[str, WeightSource], name: str, path: Path
) -> MistralcError:
    count = sum(stored_name not in found for stored_name in names.values())
    others = f" and {count - 1} more" if count > 1 else ""
    advice = "Use the configuration and weights of one checkpoint, or download it again."
    if name == HEAD:
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
        "Use the configuration and weights of one dense checkpoint without adapters or "
        "quantization, and with biases only where its configuration says so."
    )
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
