"""Bytes of a build's weights, and bytes that a decode step reads."""

import math

from graphs.build import Build, Storage
from graphs.dtypes import Dtype, item_size
from graphs.quant_scheme import stored_parts
from graphs.spec import EMBEDDING, ModelSpec


def weight_bytes(spec: ModelSpec, storage: Storage, activation: Dtype) -> dict[str, int]:
    """Return the bytes of every weight by name, including scales if it is quantized."""
    found = {}
    for name, shape in spec.weight_shapes().items():
        scheme = storage.schemes.get(name)
        if scheme is None:
            found[name] = math.prod(shape) * item_size(activation)
        else:
            layout = storage.layouts.get(name, "onnx")
            parts = stored_parts(name, shape, scheme, activation, layout)
            found[name] = sum(part.nbytes for part in parts)
    return found


def read_bytes(build: Build) -> int:
    """Return the bytes of weights read per token: all, but only one row of an untied embedding."""
    spec = build.spec
    found = weight_bytes(spec, build.storage, build.activation)
    if not spec.tie_word_embeddings:
        found[EMBEDDING] //= spec.vocab_size
    return sum(found.values())


def step_bytes(build: Build, position: int) -> int:
    """Return the bytes that a step for one token at `position` reads: weights, keys and values."""
    slots = sum(min(position, size or position) for size in build.spec.layer_windows)
    return read_bytes(build) + slots * build.contract.slot_bytes
