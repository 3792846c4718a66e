"""Carry out a build's storage: the numbers and codes of one checkpoint. Knows nothing of graphs.

The decisions are those of `graphs.build.Storage`; here they meet the checkpoint's blocks and the
numbers of a calibration table.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch

from exporter.checkpoint.open import Checkpoint
from exporter.checkpoint.quantized.value import Quantized
from exporter.checkpoint.stored import TORCH_FLOATS
from exporter.checkpoint.weight_source import WeightSource
from exporter.options import QuantizeOptions
from exporter.quantization.calibration_table import CalibrationTable
from exporter.quantization.carry import StoredCodes
from exporter.quantization.policy import WeightFacts
from exporter.quantization.recipe import INPUT_SCALE, SMOOTHING, Recipe, touched
from graphs.build import Build
from graphs.dtypes import FLOATS
from graphs.errors import MistralcError, UsageError
from graphs.passes.quantized_weights import Quantization
from graphs.precisions import Precision
from graphs.quant_scheme import SCALE, ZERO_POINT, Scheme, groups
from graphs.spec import ModelSpec


def weight_facts(checkpoint: Checkpoint, table: CalibrationTable | None = None) -> WeightFacts:
    """What a checkpoint and a calibration table tell before a build is decided."""
    names = checkpoint.spec.weight_shapes()
    return WeightFacts(
        types=frozenset(checkpoint.dtypes.values()),
        codes={name: StoredCodes(label=one.dtype, scheme=one.scheme, not_held=one.not_held,
                                 scales=one.scales, rounds_inputs=one.rounds_inputs)
               for name, one in checkpoint.stored.items() if one.dtype not in FLOATS},
        method=checkpoint.method,
        calibrated=None if table is None else table.schemes,
        settled=frozenset() if table is None else frozenset(
            name for name in names if touched(name, checkpoint.spec, table.tensors)
        ),
        left_out=checkpoint.left_out,
    )  # fmt: skip


def check_calibration(
    precision: Precision, options: QuantizeOptions, spec: ModelSpec, table: CalibrationTable | None,
    own: Precision | None = None,
) -> None:  # fmt: skip
    """Raise UsageError or MistralcError unless the precision has the table that it needs.

    A checkpoint whose `own` precision it is has scales for its inputs.
    """
    if table is not None:
        _check_table(table, precision.name, options)
        _check_fit(table, spec)
    elif precision.needs_calibration and precision != own:
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
        tensors=_carried_input_scales(build, checkpoint) if table is None else table.tensors,
        repacked=carried_codes(build, checkpoint),
    )


def carried_codes(build: Build, checkpoint: Checkpoint) -> dict[str, Callable[[], Quantized]]:
    """Return functions that read the codes that the build takes from the checkpoint."""
    stored = TORCH_FLOATS[build.activation]
    return {
        name: partial(_carried, checkpoint.stored[name], build.storage.schemes[name], stored)
        for name in build.storage.copied
    }


def _carried(source: WeightSource, scheme: Scheme, stored: torch.dtype) -> Quantized:
    found = source.quantized
    if found is None:
        raise ValueError(f"{source.name} has no codes")
    return found[1]().held_in(scheme, stored)


def _carried_input_scales(build: Build, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Return the input scale of every group whose codes are the checkpoint's.

    The linears of a group read one value, which is rounded once: the largest scale clips nothing.
    """
    found = {}
    for group in groups(build.spec):
        scheme = build.storage.schemes.get(group.readers[0])
        if scheme is None or scheme.activation is None:
            continue
        reads = [checkpoint.stored[name].input_scale for name in group.readers]
        scale = max(read() for read in reads if read is not None)
        found[group.name + INPUT_SCALE] = torch.tensor(scale)
    return found


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
