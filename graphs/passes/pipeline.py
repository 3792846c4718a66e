"""Which passes run for which build, and in which order. This is the whole optimizer."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import onnx_ir as ir

from graphs.build import Build
from graphs.contract import PADDED
from graphs.passes.dead_code import DEAD_CODE
from graphs.passes.fix_dimensions import fix_dimensions
from graphs.passes.fold_constants import FOLD_CONSTANTS
from graphs.passes.fold_query_groups import FoldQueryGroups
from graphs.passes.merge_linears import MERGE_GATE_UP, MERGE_QKV
from graphs.passes.onnxruntime.fold_attention_scale import FOLD_ATTENTION_SCALE
from graphs.passes.onnxruntime.fuse_transpose import FUSE_TRANSPOSE
from graphs.passes.onnxruntime.group_query_attention import GroupQueryAttention
from graphs.passes.onnxruntime.pad_query import PAD_QUERY
from graphs.passes.onnxruntime.skip_norm import SKIP_NORM
from graphs.passes.quantize_linears import QuantizeLinears
from graphs.passes.quantized_weights import Quantization
from graphs.passes.rule import CONTRIB, Pass
from graphs.passes.tie_embedding import TIE_EMBEDDING
from graphs.passes.trt.in_place import InPlace
from graphs.passes.trt.keep_gate_up_apart import KEEP_GATE_UP_APART
from graphs.spec import ModelSpec
from graphs.targets import AttentionForm, require_entry_per_target

PORTABLE: tuple[Pass, ...] = (TIE_EMBEDDING, FOLD_CONSTANTS, DEAD_CODE)
"""The first passes of every target. After them, the graph has standard operators only."""

ATTENTION: Literal["attention"] = "attention"
"""Stands for the passes of the forms of attention that a build takes (`graphs.attention_form`)."""

PASSES: Mapping[str, tuple[Pass | Literal["attention"], ...]] = {
    "cpu": (
        *PORTABLE, MERGE_QKV, MERGE_GATE_UP, SKIP_NORM, ATTENTION, DEAD_CODE, FOLD_ATTENTION_SCALE,
    ),
    "cuda": (*PORTABLE, MERGE_QKV, MERGE_GATE_UP, SKIP_NORM, ATTENTION, DEAD_CODE),
    "rtx": (*PORTABLE, ATTENTION, KEEP_GATE_UP_APART),
    "tensorrt": (*PORTABLE, ATTENTION, KEEP_GATE_UP_APART),
}  # fmt: skip

require_entry_per_target(PASSES, "graphs.passes.pipeline.PASSES")

BATCH_INVARIANT: Mapping[str, tuple[Pass, ...]] = {"cpu": (PAD_QUERY,)}
"""Added if logits must have the same bits for any batch and step size."""

LAST: Mapping[str, tuple[Pass, ...]] = dict.fromkeys(("cpu", "cuda"), (FUSE_TRANSPOSE, DEAD_CODE))
"""Run after the quantized linears are written, for the linears that are left."""


def passes_of(build: Build, quantization: Quantization | None = None) -> tuple[Pass, ...]:
    """The passes of a build, in order.

    Quantized linears are written after the passes have merged linears. `quantization` is by default
    the build's own, without the scales of rounded inputs, which only a calibration table knows.
    """
    if quantization is None:
        quantization = Quantization(
            schemes=build.storage.schemes, layouts=build.storage.layouts,
            rounds_blocks=build.target.rounds_blocks,
        )  # fmt: skip
    name = build.target.name
    steps: list[Pass] = []
    for step in PASSES[name]:
        steps += _attention(build) if step == ATTENTION else [step]
    if build.batch_invariant:
        steps += BATCH_INVARIANT[name]
    if quantization.schemes:
        write = QuantizeLinears(quantization=quantization, activation=build.activation)
        steps += (write, DEAD_CODE)
    return (*steps, *LAST.get(name, ()))


def lower(
    model: ir.Model, build: Build, quantization: Quantization | None = None
) -> dict[str, int]:
    """Run the passes of a build on `model` in place; returns how often each fired.

    Unless the target's ring grows, its capacity becomes a constant first. With `batch_invariant`,
    logits have the same bits for any batch and step size. Raises PassError if a pass that must fire
    does not.
    """
    if not build.target.ring_grows:
        fix_dimensions(model, build.contract.capacities)
    return run(model, build.spec, passes_of(build, quantization))


def run(model: ir.Model, spec: ModelSpec, passes: Iterable[Pass]) -> dict[str, int]:
    """Run `passes` on `model` in place; returns how often each fired, by its name."""
    fired: dict[str, int] = {}
    for step in passes:
        fired[step.name] = fired.get(step.name, 0) + step(model, spec)
    if any(node.domain == CONTRIB for node in model.graph):
        model.opset_imports[CONTRIB] = 1
    return fired


def _attention(build: Build) -> Iterator[Pass]:
    """The passes that give every layer its form; `masked` and `unfused` ones stay as they are."""

    def windows(form: AttentionForm) -> tuple[int | None, ...]:
        return tuple(size for size, taken in build.attention.items() if taken == form)

    if windows("grouped"):
        yield _grouped(build)
    if windows("folded"):
        yield FoldQueryGroups(windows=windows("folded"))
    if windows("in_place"):
        yield InPlace(windows=windows("in_place"))


def _grouped(build: Build) -> GroupQueryAttention:
    folds_scale = FOLD_ATTENTION_SCALE in PASSES[build.target.name]
    if build.target.ring_grows:
        padding = PADDED if build.batch_invariant else 0
        count, total = build.ring.context + padding, None
    else:
        count = total = build.ring.capacity(None)
    return GroupQueryAttention(
        positions=count, total=total, activation=build.activation, folds_scale=folds_scale
    )
