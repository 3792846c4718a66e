"""How every weight of one checkpoint is quantized. Knows nothing about graphs.

The schemes of `exporter/quantization/policy.py`, but for what the checkpoint has in blocks
already and what a table of calibration says for itself.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from exporter.checkpoint.open import Checkpoint
from exporter.quantization.calibration_table import CalibrationTable
from exporter.quantization.gguf_blocks import block_scheme, read_blocks
from exporter.quantization.policy import (
    CALIBRATED,
    QuantizeOptions,
    fitting,
    layer_schemes,
    layouts,
    output_scheme,
)
from exporter.quantization.recipe import INPUT_SCALE, SMOOTHING, Recipe
from graphs.errors import MistralcError, UsageError
from graphs.manifest import Manifest
from graphs.passes.quantize_linears import Quantization
from graphs.quant_scheme import QUANTIZED, SCALE, ZERO_POINT, Scheme, groups
from graphs.spec import Dtype, ModelSpec


def make_recipe(
    checkpoint: Checkpoint, spec: ModelSpec, target: str, precision: str, activation: Dtype,
    options: QuantizeOptions, table: CalibrationTable | None,
) -> Recipe:  # fmt: skip
    """Decide how every weight is stored. Raises UsageError where options do not fit together."""
    if precision not in QUANTIZED:
        if table is not None or options != QuantizeOptions():
            raise UsageError(
                f"The precision {precision} quantizes nothing, so --calibration, --block, "
                f"--symmetric and --keep have no meaning. Leave them out, or choose one of "
                f"{', '.join(QUANTIZED)}."
            )
        return Recipe(spec=spec, activation=activation)
    cpu = target == "cpu"
    if table is None:
        _check_rounds_weights_only(precision)
        schemes = layer_schemes(spec, target, precision, options)
        plain = Recipe(spec=spec, activation=activation, schemes=schemes)
        recipe = _repacked(plain, checkpoint, options) if cpu else plain
    else:
        _check_table(table, precision, options)
        _check_fit(table, spec)
        recipe = Recipe(
            spec=spec, activation=activation, schemes=table.schemes, tensors=table.tensors
        )
    head = output_scheme(spec, target, precision, options)
    if head is not None:
        recipe = _with_output_layer(recipe, checkpoint, *head)
    fitted = fitting(spec, target, recipe.schemes, decided=recipe.calibrated)
    return replace(recipe, schemes=fitted, layouts=layouts(target, fitted))


def quantization(recipe: Recipe) -> Quantization:
    """Return what the graph must know of a recipe."""
    rounded = (n for n, scheme in recipe.schemes.items() if scheme.activation is not None)
    scales = {name: recipe.input_scale(name) for name in rounded}
    return Quantization(schemes=recipe.schemes, input_scales=scales, layouts=recipe.layouts)


def describe(recipe: Recipe, table: CalibrationTable | None) -> dict[str, Any] | None:
    """Return what a manifest says of a recipe; None where nothing is quantized."""
    if not recipe.schemes:
        return None
    return {
        "schemes": {name: scheme.to_json() for name, scheme in recipe.schemes.items()},
        "input_scales": dict(quantization(recipe).input_scales),
        "layouts": dict(sorted(recipe.layouts.items())),
        "repacked": sorted(recipe.repacked),
        "method": "round to nearest" if table is None else table.method,
        "calibration": None if table is None else table.fingerprint,
    }


def stored_recipe(manifest: Manifest) -> Recipe:
    """Return the recipe that a manifest describes, without the numbers of its weights."""
    facts = manifest.quantization
    plain = Recipe(spec=manifest.model, activation=manifest.activation)
    if facts is None:
        return plain
    scales: Mapping[str, float] = facts["input_scales"]
    return replace(
        plain,
        schemes={name: Scheme.from_json(entry) for name, entry in facts["schemes"].items()},
        layouts=facts["layouts"],
        tensors={
            group.name + INPUT_SCALE: torch.tensor(scales[group.readers[0]])
            for group in groups(manifest.model)
            if group.readers[0] in scales
        },
    )


def _check_rounds_weights_only(precision: str) -> None:
    if precision in CALIBRATED:
        raise UsageError(
            f"The precision {precision} rounds activations, whose ranges only samples of text can "
            f"tell. Run `mistralc calibrate CHECKPOINT -o TABLE --precision {precision}`, and "
            "export with --calibration TABLE."
        )


def _repacked(recipe: Recipe, checkpoint: Checkpoint, options: QuantizeOptions) -> Recipe:
    """Take the blocks of a GGUF file as they are, where they are what was asked for."""
    schemes, exact = dict(recipe.schemes), {}
    for group in groups(recipe.spec):
        found = {block_scheme(checkpoint.dtypes[name]) for name in group.readers}
        scheme = found.pop()
        asked = recipe.schemes[group.readers[0]]
        same = scheme is not None and (scheme.codes, scheme.block) == (asked.codes, asked.block)
        if found or scheme is None or not same or (options.symmetric and scheme.offset != "none"):
            continue
        for name in group.readers:
            schemes[name] = scheme
            exact[name] = read_blocks(checkpoint, name)
    return replace(recipe, schemes=schemes, repacked=exact)


def _with_output_layer(recipe: Recipe, checkpoint: Checkpoint, name: str, scheme: Scheme) -> Recipe:
    """Quantize the output layer too, by the blocks of a GGUF file if those are the scheme's."""
    recipe = replace(recipe, schemes={**recipe.schemes, name: scheme})
    if block_scheme(checkpoint.dtypes[name]) == scheme:
        exact = {**recipe.repacked, name: read_blocks(checkpoint, name)}
        recipe = replace(recipe, repacked=exact)
    return recipe


def _check_table(table: CalibrationTable, precision: str, options: QuantizeOptions) -> None:
    if table.precision != precision:
        raise UsageError(
            f"The calibration table was made for {table.precision} and --precision is {precision}. "
            "Give the table's precision, or calibrate again."
        )
    if options.block is not None or options.symmetric:
        raise UsageError(
            "--block and --symmetric were decided when the calibration table was made. Leave them "
            "out, or calibrate again with them."
        )


def _check_fit(table: CalibrationTable, spec: ModelSpec) -> None:
    """Raise MistralcError unless the table's names and shapes are those of the model."""
    allowed = _allowed_shapes(table, spec)
    linears = {name for group in groups(spec) for name in group.readers}
    strange = [name for name in table.schemes if name not in linears]
    strange += [
        n for n, value in table.tensors.items() if tuple(value.shape) not in allowed.get(n, ())
    ]
    strange += [
        group.name + INPUT_SCALE
        for group in groups(spec)
        if any((scheme := table.schemes.get(name)) and scheme.activation for name in group.readers)
        and group.name + INPUT_SCALE not in table.tensors
    ]
    if strange:
        raise MistralcError(
            f"The calibration table does not fit its checkpoint: {strange[0]:.80} is missing, of "
            "another shape, or not of this model. Run `mistralc calibrate` again."
        )


def _allowed_shapes(
    table: CalibrationTable, spec: ModelSpec
) -> Mapping[str, Collection[tuple[int, ...]]]:
    """The shapes that each tensor of a table may have, by name; see calibration_table.py."""
    shapes, found = spec.weight_shapes(), {}
    for group in groups(spec):
        found[group.name + SMOOTHING] = {shapes[group.readers[0]][1:]}
        found[group.name + INPUT_SCALE] = {(), (1,)}
        for name in (name for name in group.readers if name in table.schemes):
            n, k = shapes[name]
            blocks = table.schemes[name].blocks(k)
            found[name + SCALE] = found[name + ZERO_POINT] = {(n, 1), (n, blocks)}
            found[name] = {(n, k), (n, -(-k // 2))}
    return found
