"""Which passes run for which target, and in which order. This is the whole optimizer."""

from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir

from graphs.build import Build
from graphs.contract import PADDED
from graphs.dtypes import Dtype
from graphs.passes.dead_code import DEAD_CODE
from graphs.passes.fold_constants import FOLD_CONSTANTS
from graphs.passes.merge_linears import MERGE_GATE_UP, MERGE_QKV
from graphs.passes.onnxruntime.fold_attention_scale import FOLD_ATTENTION_SCALE
from graphs.passes.onnxruntime.fuse_transpose import FUSE_TRANSPOSE
from graphs.passes.onnxruntime.group_query_attention import GROUP_QUERY_ATTENTION
from graphs.passes.onnxruntime.pad_query import PAD_QUERY
from graphs.passes.onnxruntime.skip_norm import SKIP_NORM
from graphs.passes.quantize_linears import QuantizeLinears
from graphs.passes.quantized_weights import Quantization
from graphs.passes.rule import CONTRIB, Pass
from graphs.passes.tie_embedding import TIE_EMBEDDING
from graphs.passes.trt.fold_query_groups import FOLD_QUERY_GROUPS
from graphs.passes.trt.keep_gate_up_apart import KEEP_GATE_UP_APART
from graphs.spec import ModelSpec
from graphs.targets import require_entry_per_target

PORTABLE: tuple[Pass, ...] = (TIE_EMBEDDING, FOLD_CONSTANTS, DEAD_CODE)
"""The first passes of every target. After them, the graph has standard operators only."""

PASSES: Mapping[str, tuple[Pass, ...]] = {
    "portable": PORTABLE,
    "cpu": (
        *PORTABLE,
        MERGE_QKV,
        MERGE_GATE_UP,
        SKIP_NORM,
        GROUP_QUERY_ATTENTION,
        DEAD_CODE,
        FOLD_ATTENTION_SCALE,
    ),
    "cuda": (*PORTABLE, MERGE_QKV, MERGE_GATE_UP, DEAD_CODE),
    "rtx": (*PORTABLE, FOLD_QUERY_GROUPS, KEEP_GATE_UP_APART),
    "tensorrt": (*PORTABLE, FOLD_QUERY_GROUPS, KEEP_GATE_UP_APART),
}

require_entry_per_target(
    {name: passes for name, passes in PASSES.items() if name != "portable"},
    "graphs.passes.pipeline.PASSES",
)

BATCH_INVARIANT: Mapping[str, tuple[Pass, ...]] = {"cpu": (PAD_QUERY,)}
"""Added if logits must have the same bits for any batch and step size."""

LAST: Mapping[str, tuple[Pass, ...]] = {"cpu": (FUSE_TRANSPOSE, DEAD_CODE)}
"""Run after the quantized linears are written, for the linears that are left."""


def pass_names(build: Build) -> tuple[str, ...]:
    """Names of the passes that a build goes through, in order."""
    quantization = Quantization(schemes=build.storage.schemes, layouts=build.storage.layouts)
    steps = _steps(
        build.target.name, quantization, build.activation, batch_invariant=build.batch_invariant
    )
    return tuple(step.name for step in steps)


def lower(
    model: ir.Model,
    spec: ModelSpec,
    target: str,
    quantization: Quantization | None = None,
    activation: Dtype = "float32",
    context: int | None = None,
    *,
    batch_invariant: bool = False,
) -> dict[str, int]:
    """Run the passes of `target` on `model` in place; returns how often each fired.

    Quantized linears are written after the passes have merged linears. `context` is the longest
    text, by default as many positions as the model was trained for. With `batch_invariant`, logits
    have the same bits for any batch and step size. Raises PassError if a pass that must fire
    does not.
    """
    fired: dict[str, int] = {}
    positions = context or spec.max_position_embeddings
    if batch_invariant:
        positions += PADDED
    spec = replace(spec, max_position_embeddings=positions)
    for step in _steps(target, quantization, activation, batch_invariant=batch_invariant):
        fired[step.name] = fired.get(step.name, 0) + step(model, spec)
    if any(node.domain == CONTRIB for node in model.graph):
        model.opset_imports[CONTRIB] = 1
    return fired


def _steps(
    target: str, quantization: Quantization | None, activation: Dtype, *, batch_invariant: bool
) -> tuple[Pass, ...]:
    """The passes of `target`, with those that invariance and quantized linears add."""
    passes = PASSES[target]
    if batch_invariant:
        passes += BATCH_INVARIANT[target]
    if quantization is not None and quantization.schemes:
        write = QuantizeLinears(quantization=quantization, activation=activation)
        passes += (write, DEAD_CODE)
    return passes + LAST.get(target, ())
