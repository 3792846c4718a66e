"""Carry out a build's storage: the numbers and codes of one checkpoint. Knows nothing of graphs.

The decisions are those of `graphs.build.Storage`; here they meet the checkpoint's blocks and the
numbers of a calibration table.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch

from exporter.checkpoint.open import Checkpoint
from exporter.checkpoint.quantized.value import Quantized
from exporter.options import QuantizeOptions
from exporter.quantization.calibration_table import CalibrationTable
from exporter.quantization.policy import WeightFacts
from exporter.quantization.recipe import INPUT_SCALE, SMOOTHING, Recipe, touched
from graphs.build import Build
from graphs.errors import MistralcError, UsageError
from graphs.passes.quantized_weights import Quantization
from graphs.precisions import Precision
from graphs.quant_scheme import SCALE, ZERO_POINT, groups
from graphs.spec import ModelSpec


def weight_facts(checkpoint: Checkpoint, table: CalibrationTable | None = None) -> WeightFacts:
    """What a checkpoint and a calibration table tell before a build is decided."""
    names = checkpoint.spec.weight_shapes()
    return WeightFacts(
        types=frozenset(checkpoint.dtypes.values()),
        blocks={n: one.scheme for n, one in checkpoint.stored.items() if one.scheme is not None},
        calibrated=None if table is None else table.schemes,
        settled=frozenset() if table is None else frozenset(
            name for name in names if touched(name, checkpoint.spec, table.tensors)
        ),
        left_out=checkpoint.left_out,
    )  # fmt: skip


def check_calibration(
    precision: Precision, options: QuantizeOptions, spec: ModelSpec, table: CalibrationTable | None
) -> None:
    """Raise UsageError or MistralcError unless the precision has the table that it needs."""
    if table is not None:
        _check_table(table, precision.name, options)
        _check_fit(table, spec)
    elif precision.needs_calibration:
        raise UsageError(
            f"The precision {precision.name} rounds activations, whose ranges only samples of text "
            f"can tell. Run `mistralc calibrate CHECKPOINT -o TABLE --precision {precision.name}`, "
            "then export with --calibration TABLE."
        )


def make_recipe(build: Build, checkpoint: Checkpoint, table: CalibrationTable | None) -> Recipe:
    """Join what was decided with the checkpoint's blocks and the table's numbers."""
    return Recipe(
        spec=build.spec,
        activation=build.activation,
        schemes=build.storage.schemes,
        layouts=build.storage.layouts,
        rounds_blocks=build.target.rounds_blocks,
        tensors={} if table is None else table.tensors,
        repacked=carried_codes(checkpoint, build.storage.copied),
    )


def carried_codes(
    checkpoint: Checkpoint, names: Iterable[str]
) -> dict[str, Callable[[], Quantized]]:
    """Return functions that read the codes of these weights as the checkpoint has them."""
    found = {name: checkpoint.stored[name].quantized for name in names}
    return {name: one[1] for name, one in found.items() if one is not None}


def quantization(recipe: Recipe) -> Quantization:
    """What the graph passes need to know of a recipe."""
    rounded = (n for n, scheme in recipe.schemes.items() if scheme.activation is not None)
    scales = {name: recipe.input_scale(name) for name in rounded}
    return Quantization(
        schemes=recipe.schemes, input_scales=scales, layouts=recipe.layouts,
        rounds_blocks=recipe.rounds_blocks,
    )  # fmt: skip


def describe(
    recipe: Recipe, table: CalibrationTable | None, quality: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """A recipe's record in the manifest; None if nothing is quantized."""
    if not recipe.schemes:
        return None
    return {
        "schemes": {name: scheme.to_json() for name, scheme in recipe.schemes.items()},
        "input_scales": dict(quantization(recipe).input_scales),
        "layouts": dict(sorted(recipe.layouts.items())),
        "repacked": sorted(recipe.repacked),
        "method": "round to nearest" if table is None else table.method,
        "calibration": None if table is None else table.fingerprint,
        **({} if quality is None else {"quality": quality}),
    }


def stored_recipe(build: Build, record: Mapping[str, Any] | None) -> Recipe:
    """Return the recipe of a finished bundle, without the numbers of its weights.

    `record` is what its manifest says of the quantization.
    """
    scales: Mapping[str, float] = {} if record is None else record["input_scales"]
    return Recipe(
        spec=build.spec,
        activation=build.activation,
        schemes=build.storage.schemes,
        layouts=build.storage.layouts,
        rounds_blocks=build.target.rounds_blocks,
        tensors={
            group.name + INPUT_SCALE: torch.tensor(scales[group.readers[0]])
            for group in groups(build.spec)
            if group.readers[0] in scales
        },
    )


def _check_table(table: CalibrationTable, precision: str, options: QuantizeOptions) -> None:
    if table.precision != precision:
        raise UsageError(
            f"The calibration table is for {table.precision}, but --precision is {precision}. "
            "Give the table's precision, or calibrate again."
        )
    if options.block is not None or options.symmetric:
        raise UsageError(
            "--block and --symmetric were fixed when the calibration table was made. Leave them "
            "out, or calibrate again with other values."
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
            f"The calibration table does not fit the checkpoint: {strange[0]:.80} is missing, has "
            "another shape, or is not of this model. Run `mistralc calibrate` again."
        )


def _allowed_shapes(
    table: CalibrationTable, spec: ModelSpec
) -> Mapping[str, Collection[tuple[int, ...]]]:
    """The allowed shapes of each tensor of a table, by name; see calibration_table.py."""
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
