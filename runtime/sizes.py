"""How many bytes a bundle has, and how many of them a token costs. Knows no file and no session."""

import math
from collections.abc import Mapping

from graphs.manifest import Manifest
from graphs.scheme import Scheme, stored_parts
from graphs.spec import ITEM_SIZE


def file_bytes(manifest: Manifest) -> int:
    """Bytes of all files of the bundle."""
    return sum(entry.size for entry in manifest.files.values())


def read_bytes(manifest: Manifest) -> int:
    """Bytes of weights that a decoded token reads: all, but one row of an untied embedding."""
    spec, schemes = manifest.model, schemes_of(manifest)
    nbits = set((manifest.quantization or {}).get("nbits", ()))
    item = ITEM_SIZE[manifest.activation]
    total = 0
    for name, shape in spec.weight_shapes().items():
        scheme = schemes.get(name)
        if scheme is not None:
            parts = stored_parts(name, shape, scheme, manifest.activation, nbits=name in nbits)
            total += sum(part.nbytes for part in parts)
        elif name == "model.embed_tokens.weight" and not spec.tie_word_embeddings:
            total += spec.hidden_size * item
        else:
            total += math.prod(shape) * item
    return total


def schemes_of(manifest: Manifest) -> Mapping[str, Scheme]:
    """How each quantized weight is stored, by its name."""
    facts = manifest.quantization or {}
    return {name: Scheme.from_json(entry) for name, entry in facts.get("schemes", {}).items()}
