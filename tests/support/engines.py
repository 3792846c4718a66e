"""Engines built on purpose, right and wrong, from a small model with random weights."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import onnx_ir as ir

from exporter.engine.process import build_engine
from exporter.engine.request import BuildRequest, EnginePlan, profiles
from graphs.build import Build
from graphs.passes.fix_dimensions import fix_dimensions
from graphs.passes.pipeline import PORTABLE, passes_of, run
from graphs.passes.quantize_linears import QuantizeLinears
from graphs.passes.quantized_weights import Quantization
from graphs.passes.rule import Pass
from graphs.passes.weight_ref import WeightRef, weight_of
from graphs.quant_scheme import default_scheme, groups
from graphs.spec import RingSpec
from tests.support import tiny
from tests.support.make_checkpoint import tiny_spec

SPEC = tiny_spec(
    vocab_size=4096, hidden_size=512, intermediate_size=1024, num_attention_heads=8,
    num_key_value_heads=2, head_dim=64, window=13,
)  # fmt: skip  # 9 million weights, so that storing them twice shows in the plan's size
RING = RingSpec(chunk=64, context=1)
BUILD = tiny.build(SPEC, "rtx", ring=RING, activation="float16")


def write_graph(
    directory: Path,
    build: Build = BUILD,
    passes: Iterable[Pass] | None = None,
    precision: str | None = None,
) -> ir.Model:
    """Write `directory`/model.onnx, from which an engine is built; returns the graph.

    `passes` replace those of the build after the portable ones. With `precision`, the linears of
    the layers have random codes and scales of it.
    """
    spec = build.spec
    model = tiny.traced(spec, build.activation)
    fix_dimensions(model, build.contract.capacities)
    run(model, spec, passes_of(build) if passes is None else (*PORTABLE, *passes))
    if precision is not None:
        linears = [name for group in groups(spec) for name in group.readers]
        scheme = default_scheme(precision, block=128 if precision == "int4wo" else None)
        quantization = Quantization(
            schemes=dict.fromkeys(linears, scheme), input_scales=dict.fromkeys(linears, 0.05)
        )
        run(model, spec, [QuantizeLinears(quantization=quantization, activation=build.activation)])
    for value in model.graph.initializers.values():
        weight = weight_of(value)
        if weight is not None:
            value.const_value = _random(weight)
    ir.save(model, directory / "model.onnx")
    return model


def compile_graph(directory: Path, build: Build = BUILD, **changed: Any) -> EnginePlan:
    """Compile `directory`/model.onnx into `engine.plan`; `changed` replaces what is requested."""
    request: dict[str, Any] = {
        "graph": directory / "model.onnx", "plan": directory / "engine.plan",
        "contract": build.contract, "target": "rtx",
        "profiles": profiles(build.ring, apart=build.decodes_apart),
    }  # fmt: skip
    return build_engine(BuildRequest(**request | changed))


def _random(weight: WeightRef) -> ir.Tensor:
    """Numbers of a weight's type, different for each weight; scales are positive."""
    generator = np.random.default_rng(crc32(str(weight.name).encode()))
    dtype, shape = weight.dtype, weight.sizes
    if dtype in (ir.DataType.INT8, ir.DataType.INT4):
        most = 127 if dtype == ir.DataType.INT8 else 7
        numbers = generator.integers(-most, most, shape).astype(dtype.numpy())
    else:
        drawn = 0.02 * generator.standard_normal(shape)
        scale = "_scale" in str(weight.name)
        numbers = np.asarray(np.abs(drawn) + 0.01 if scale else drawn).astype(dtype.numpy())
    return ir.Tensor(numbers, dtype=dtype, name=weight.name)


def reproduced(builds: Sequence[Callable[[], Hashable]]) -> bool:
    """Whether all builds give one result.

    If they do not at once, each is run a second time, and one result has to be common to all: on a
    host with many more processes than cores, about one build in thirty differed from all others
    (`exporter/engine/addresses.py`). A result that depends on how it is built differs both times.
    """
    results = [{build()} for build in builds]
    if len(set.union(*results)) > 1:
        for result, build in zip(results, builds, strict=True):
            result.add(build())
    return bool(set.intersection(*results))
