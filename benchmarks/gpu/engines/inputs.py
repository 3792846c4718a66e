"""Inputs for `polygraphy run --data-loader-script`: the same steps for a graph and for an engine.

Polygraphy calls `load_data`, without arguments; the environment says for which bundle
(MISTRALC_BUNDLE, its directory) and in which type caches are given (MISTRALC_DTYPE, float32 or
float16). Both runs get the same numbers: they are drawn in float16.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from graphs.build import Build
from graphs.manifest import read_manifest

Feed = dict[str, NDArray[np.generic]]
SPREAD = 1.0  # standard deviation of cached keys and values


def load_data() -> Iterator[Feed]:
    """Yield the inputs of every step, by tensor name."""
    build = read_manifest(Path(os.environ["MISTRALC_BUNDLE"])).build
    yield from feeds(build, np.dtype(os.environ.get("MISTRALC_DTYPE", "float32")))


def feeds(build: Build, dtype: np.dtype[np.floating]) -> Iterator[Feed]:
    """A prompt into an empty ring, a token after a full ring, and a chunk at the ring's begin."""
    capacity = max(build.contract.capacities.values())
    chunk = build.ring.chunk
    wrapped = capacity if build.spec.slides else 0
    yield feed(build, 0, chunk, dtype, filled=False)
    yield feed(build, wrapped + capacity // 2, 1, dtype, filled=True)
    yield feed(build, wrapped, chunk, dtype, filled=True)


def feed(
    build: Build, first: int, count: int, dtype: np.dtype[np.floating], *, filled: bool
) -> Feed:
    """The inputs of one step of `count` tokens from position `first` on; logits of the last."""
    draw = np.random.default_rng(first + count)
    sizes = build.contract.sizes(batch=1, tokens=count, wanted=1)
    found: Feed = {}
    for tensor in build.contract.inputs:
        shape = tensor.sized(sizes)
        if tensor.name == "input_ids":
            found[tensor.name] = draw.integers(0, build.spec.vocab_size, shape)
        elif tensor.name == "position_ids":
            found[tensor.name] = np.arange(first, first + count)[None]
        elif tensor.name == "logits_indices":
            found[tensor.name] = np.full(shape, count - 1)
        elif filled:
            cached = draw.standard_normal(shape, np.float32) * SPREAD
            found[tensor.name] = cached.astype(np.float16).astype(dtype)
        else:
            found[tensor.name] = np.zeros(shape, dtype)
    return found
