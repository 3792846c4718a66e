"""Write graphs of true shapes without weights, to be filled on the host of a GPU.

A bundle without weights is not a bundle, so this is a part of the benchmark and not an option of
`mistralc export`. It makes the same decisions and runs the same passes. Of a 7B only about 300 kB
of graph and manifest remain; `fill.py` makes the weights in place.

    OUT/NAME/manifest.json    the build, from which the layout of the weights follows
    OUT/NAME/VARIANT.onnx     for each variant, see variants.py
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from benchmarks.gpu.variants import SHIPPED, SYMBOLIC, variant_build
from exporter.bundle.staging import write_model
from exporter.bundle.weights_file import link_weights
from exporter.decide import decide
from exporter.decoder.trace import trace
from exporter.export import versions
from exporter.options import BuildOptions
from exporter.quantization.make_recipe import describe, quantization
from exporter.quantization.recipe import Recipe
from graphs.build import Build
from graphs.manifest import FILE_NAME, Manifest
from graphs.passes.dead_code import DEAD_CODE
from graphs.passes.merge_linears import MERGE_GATE_UP, MERGE_QKV
from graphs.passes.pipeline import PORTABLE, lower, run
from graphs.spec import ModelSpec
from graphs.targets import TARGETS
from tests.support.make_checkpoint import PRESETS

MISTRAL_7B = PRESETS["mistral-7b-v0.1"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """A bundle to write without weights: its model, its options, and the variants of its graph."""

    name: str
    spec: ModelSpec
    options: BuildOptions
    variants: tuple[str, ...] = (SHIPPED,)


def write_shapes(shapes: Shapes, directory: Path) -> None:
    """Write one bundle's manifest, graphs and header into `directory`, which is made."""
    directory.mkdir(parents=True, exist_ok=True)
    build = decide(shapes.spec, TARGETS["cuda"], shapes.options)
    recipe = Recipe(
        spec=build.spec, activation=build.activation, schemes=build.storage.schemes,
        layouts=build.storage.layouts,
    )  # fmt: skip
    traced = trace(build.spec, build.activation)
    for variant in shapes.variants:
        model = variant_model(traced.clone(), build, recipe, variant)
        link_weights(model, recipe, directory)
        write_model(model, directory)
        (directory / "model.onnx").rename(directory / f"{variant}.onnx")
    manifest = Manifest(
        target=build.target.name, precision=build.precision.name, activation=build.activation,
        model=build.spec, ring=build.ring, window_source=build.window_source,
        checkpoint={"name": "random weights", "format": "none", "fingerprint": ""},
        versions=versions(), quantization=describe(recipe, None), files={},
    )  # fmt: skip
    (directory / FILE_NAME).write_text(manifest.to_text(), encoding="utf-8")


def variant_model(model: ir.Model, build: Build, recipe: Recipe, variant: str) -> ir.Model:
    """Lower a traced graph in place to one of VARIANTS; weights stay references."""
    if variant == SYMBOLIC:
        if recipe.schemes:
            raise ValueError("no quantized bundle ever had a ring of symbolic capacity")
        run(model, build.spec, (*PORTABLE, MERGE_QKV, MERGE_GATE_UP, DEAD_CODE))
    else:
        lower(model, variant_build(build, variant), quantization(recipe))
    return model


def layers(spec: ModelSpec, windows: Iterable[int | None]) -> ModelSpec:
    """The same model with one layer for each of these windows."""
    chosen = tuple(windows)
    return replace(spec, num_hidden_layers=len(chosen), layer_windows=chosen)


def small(spec: ModelSpec = MISTRAL_7B) -> list[Shapes]:
    """What is checked for correctness: few layers, and windows that a short text goes beyond."""
    window, chunk = 256, 64  # a ring of 320 slots
    options = BuildOptions(chunk=chunk, max_batch=4)
    whole = replace(options, context=1024)
    kinds = {
        "window": (layers(spec, (window, window)), options),
        "full": (layers(spec, (None, None)), whole),
        "mixed": (layers(spec, (window, None)), whole),
    }
    return [
        Shapes(
            name=f"small-{kind}-{precision}", spec=each,
            options=replace(chosen, precision=precision),
            variants=(SHIPPED, "unfused") if kind == "window" else (SHIPPED,),
        )
        for kind, (each, chosen) in kinds.items()
        for precision in TARGETS["cuda"].activations
    ]  # fmt: skip


def large(spec: ModelSpec = MISTRAL_7B) -> list[Shapes]:
    """What is measured: a 7B with a window, and without one at a context of 8192."""
    options = BuildOptions(max_batch=4)
    full = layers(spec, (None,) * spec.num_hidden_layers)
    whole = replace(options, context=8192, max_batch=1)
    variants = (SHIPPED, "masked", "unfused")
    return [
        Shapes(name="7b-window-int4wo", spec=spec, variants=variants,
               options=replace(options, precision="int4wo")),
        Shapes(name="7b-window-fp16", spec=spec, variants=(*variants, SYMBOLIC),
               options=replace(options, precision="fp16")),
        Shapes(name="7b-full-int4wo", spec=full, options=replace(whole, precision="int4wo")),
    ]  # fmt: skip
