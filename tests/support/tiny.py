"""Tiny random models: weights, PyTorch decoder, ONNX graph, session.

Tracing takes about 2 s per model, so traces are cached and every caller gets a copy. Weights are
those that `write_checkpoint` writes for the same spec and seed.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from exporter.decoder.load import load_decoder
from exporter.decoder.model import Decoder
from exporter.decoder.trace import trace
from graphs.build import Build, Storage
from graphs.contract import GraphContract
from graphs.dtypes import Dtype
from graphs.passes.pipeline import PORTABLE, lower, run
from graphs.passes.weight_ref import WeightRef, weight_of
from graphs.precisions import PRECISIONS
from graphs.spec import ModelSpec, RingSpec
from graphs.targets import TARGETS
from runtime.backends.onnxruntime_cpu import OrtSession
from runtime.backends.session import Session
from runtime.decoding.ring import Ring
from runtime.decoding.sequence import Sequence
from tests.support.make_checkpoint import chunks

Logits = NDArray[np.float32]
Ids = NDArray[np.int64]


@cache
def weights(spec: ModelSpec, seed: int = 0) -> Mapping[str, torch.Tensor]:
    """Every weight by canonical name, in float32."""
    names = spec.weight_shapes()
    return {n: torch.from_numpy(np.concatenate(list(chunks(spec, n, seed)))) for n in names}


@cache
def decoder(spec: ModelSpec, seed: int = 0) -> Decoder:
    """The PyTorch decoder with `weights`, for eager use."""
    return load_decoder(spec, weights(spec, seed).__getitem__)


@cache
def _trace(spec: ModelSpec, activation: Dtype) -> ir.Model:
    return trace(spec, activation)


def traced(spec: ModelSpec, activation: Dtype = "float32") -> ir.Model:
    """The traced graph before any pass; the caller may change it.

    A tied and an untied model differ only in the weight of the head, so both share one trace:
    `test_trace.py` shows that this gives the same graph.
    """
    model = _trace(replace(spec, tie_word_embeddings=False), activation).clone()
    if spec.tie_word_embeddings:
        head = model.graph.initializers["lm_head.weight"]
        untied = weight_of(head)
        assert untied is not None
        head.const_value = WeightRef(
            "lm_head.weight", ("model.embed_tokens.weight",), untied.sizes, untied.dtype
        )
    return model


def build(
    spec: ModelSpec,
    target: str = "cpu",
    *,
    ring: RingSpec | None = None,
    activation: Dtype = "float32",
    batch_invariant: bool = False,
) -> Build:
    """A build that quantizes nothing; its activation may be one that the target does not take."""
    whole = RingSpec(chunk=1, context=spec.max_position_embeddings)
    return Build(
        target=TARGETS[target], precision=PRECISIONS["fp32"], storage=Storage(),
        contract=GraphContract(spec=spec, ring=ring or whole, activation=activation),
        batch_invariant=batch_invariant,
    )  # fmt: skip


def lowered(
    spec: ModelSpec, target: str, activation: Dtype = "float32", ring: RingSpec | None = None
) -> ir.Model:
    """The graph after the passes of `target`, or after the `portable` ones, with references.

    `ring` counts where the graph has its capacity; by default it holds the longest trained text.
    """
    model = traced(spec, activation)
    if target == "portable":
        run(model, spec, PORTABLE)
    else:
        lower(model, build(spec, target, activation=activation, ring=ring))
    return model


def fill(model: ir.Model, spec: ModelSpec, seed: int = 0) -> ir.Model:
    """Replace weight references by random weights, in place; return `model`."""
    return fill_from(model, weights(spec, seed).__getitem__)


def fill_from(model: ir.Model, read: Callable[[str], torch.Tensor]) -> ir.Model:
    """Replace weight references by what `read(name)` returns of each part, in place."""
    for value in model.graph.initializers.values():
        weight = weight_of(value)
        if weight is not None:
            numbers = torch.cat([read(part) for part in weight.parts]).numpy()
            shape, dtype = weight.sizes, weight.dtype
            if dtype == ir.DataType.INT4:  # two to a byte
                value.const_value = ir.PackedTensor(numbers, dtype, shape=shape, name=weight.name)
                continue
            value.const_value = ir.Tensor(
                numbers.reshape(shape).astype(dtype.numpy()), dtype=dtype, name=weight.name
            )
    return model


def model_bytes(spec: ModelSpec, target: str, seed: int = 0, ring: RingSpec | None = None) -> bytes:
    """The float32 `model.onnx` of `target` with weights inside."""
    model = fill(lowered(spec, target, ring=ring), spec, seed)
    data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return data


def load(model: bytes, spec: ModelSpec, batch: int = 1, padded: int = 0) -> OrtSession:
    """A session on `model` with one thread: the model is too small for more."""
    with TemporaryDirectory() as directory:
        path = Path(directory) / "model.onnx"
        path.write_bytes(model)
        return OrtSession(path, spec, batch=batch, threads=1, padded=padded)


@cache
def session(spec: ModelSpec, target: str = "cpu", *, batch: int = 1, seed: int = 0) -> OrtSession:
    """A cached session; a new `Ring` starts a new text on it."""
    return load(model_bytes(spec, target, seed), spec, batch)


def tokens(spec: ModelSpec, count: int, seed: int = 0) -> Ids:
    """Random token ids [count]."""
    return np.random.default_rng(seed).integers(0, spec.vocab_size, count)


def at_once(model: Decoder, ids: Ids) -> Logits:
    """Logits [n, V] of one pass over the whole text with a ring that never wraps."""
    spec, count = model.spec, len(ids)
    shape = (1, spec.num_key_value_heads, count, spec.head_dim)
    past = [torch.zeros(shape) for _ in range(2 * spec.num_hidden_layers)]
    positions = torch.arange(count)[None]
    with torch.inference_mode():
        logits, _ = model(torch.from_numpy(ids)[None], positions, positions, past)
    found: Logits = logits[0].numpy()
    return found


def in_turns(session: Session, ring: Ring, ids: Ids, turns: Iterable[int]) -> Logits:
    """Logits [n, V] of `ids`, appended to the text in `ring` in turns of these lengths."""
    found, done = [], 0
    sequence = Sequence(session, ring)
    for turn in turns:
        pieces = sequence.feed(ids[done : done + turn], np.arange(turn))
        found += [piece.logits.copy() for piece in pieces]
        done += turn
    assert done == len(ids), f"turns hold {done} tokens of {len(ids)}"
    return np.concatenate(found)
