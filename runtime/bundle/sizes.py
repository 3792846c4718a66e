"""How many bytes a bundle has, and how many of them a token costs. Knows no file and no session."""

import math
from collections.abc import Mapping

from graphs.manifest import Manifest
from graphs.quant_scheme import Layout, Scheme, stored_parts
from graphs.spec import ITEM_SIZE, Dtype, ModelSpec


def file_bytes(manifest: Manifest) -> int:
    """Bytes of all files of the bundle."""
    return sum(entry.size for entry in manifest.files.values())


def weight_bytes(
    spec: ModelSpec,
    schemes: Mapping[str, Scheme],
    layouts: Mapping[str, Layout],
    activation: Dtype,
) -> dict[str, int]:
    """Bytes of every weight by its name, with its scales where it is quantized."""
    found = {}
    for name, shape in spec.weight_shapes().items():
        scheme = schemes.get(name)
        if scheme is None:
            found[name] = math.prod(shape) * ITEM_SIZE[activation]
        else:
            parts = stored_parts(name, shape, scheme, activation, layouts.get(name, "onnx"))
            found[name] = sum(part.nbytes for part in parts)
    return found


def read_bytes(manifest: Manifest) -> int:
    """Bytes of weights that a decoded token reads: all, but one row of an untied embedding."""
    spec = manifest.model
    layouts = (manifest.quantization or {}).get("layouts", {})
    found = weight_bytes(spec, schemes_of(manifest), layouts, manifest.activation)
    if not spec.tie_word_embeddings:
        found["model.embed_tokens.weight"] //= spec.vocab_size
    return sum(found.values())


def step_bytes(manifest: Manifest, position: int) -> int:
    """Bytes that a step for one token at `position` reads: weights, keys and values."""
    spec = manifest.model
    slots = sum(min(position, size or position) for size in spec.layer_windows)
    per_slot = spec.kv_bytes_per_token(manifest.activation) // spec.num_hidden_layers
    return read_bytes(manifest) + slots * per_slot


def schemes_of(manifest: Manifest) -> Mapping[str, Scheme]:
    """How each quantized weight is stored, by its name."""
    facts = manifest.quantization or {}
    return {name: Scheme.from_json(entry) for name, entry in facts.get("schemes", {}).items()}
