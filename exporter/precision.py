"""Which weights of a checkpoint a precision quantizes, and how. Knows nothing about graphs.

The linears of the layers are always quantized, norms never. The output layer is kept in 8 bits by
the precisions that quantize weights only, or as it is with `--keep lm_head`; if it is the embedding
too, that holds for the CPU, where both read the same codes. A table of calibration says for itself
what else it quantizes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from exporter.calibration import CalibrationTable
from exporter.checkpoint import Checkpoint
from exporter.gguf_blocks import block_scheme, read_blocks
from exporter.quantized import INPUT_SCALE, Recipe
from graphs.errors import UsageError
from graphs.manifest import Manifest
from graphs.qdq import Quantization
from graphs.scheme import BLOCKS, QUANTIZED, Scheme, default_scheme, groups
from graphs.spec import Dtype, ModelSpec

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
CALIBRATED = ("int8", "fp8")  # they round activations too, whose ranges only samples can tell
ENGINE_BLOCK, CPU_BLOCK = 128, 32  # input features; of int4wo, and of int8wo on the CPU


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """What the user may choose about a quantized precision.

    `block` is for weights without a table. `symmetric` leaves zero points out where there may be
    some; TensorRT takes none. `keep` names linears to leave alone; there is only `lm_head` so far.
    """

    block: int | None = None
    symmetric: bool = False
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.block is not None and self.block not in BLOCKS:
            known = ", ".join(map(str, BLOCKS))
            raise UsageError(f"--block is {self.block}; one of {known} is expected.")
        unknown = set(self.keep) - {"lm_head"}
        if unknown:
            raise UsageError(f"--keep is {sorted(unknown)[0]!r}; lm_head is expected.")


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
        plain = Recipe(
            spec=spec, activation=activation, schemes=_nearest(spec, precision, options, cpu=cpu)
        )
        recipe = _repacked(plain, checkpoint, options) if cpu else plain
    else:
        _check_table(table, precision, options)
        recipe = Recipe(
            spec=spec, activation=activation, schemes=table.schemes, tensors=table.tensors
        )
    if "lm_head" not in options.keep and precision.endswith("wo"):
        recipe = _with_head(recipe, checkpoint, cpu=cpu)
    recipe = replace(recipe, schemes=_fitting(recipe, cpu=cpu))
    weights_only = (name for name, scheme in recipe.schemes.items() if scheme.activation is None)
    return replace(recipe, nbits=frozenset(weights_only)) if cpu else recipe


def quantization(recipe: Recipe) -> Quantization:
    """Return what the graph must know of a recipe."""
    rounded = (n for n, scheme in recipe.schemes.items() if scheme.activation is not None)
    scales = {name: recipe.input_scale(name) for name in rounded}
    return Quantization(schemes=recipe.schemes, input_scales=scales, nbits=recipe.nbits)


def describe(recipe: Recipe, table: CalibrationTable | None) -> dict[str, Any] | None:
    """Return what a manifest says of a recipe; None where nothing is quantized."""
    if not recipe.schemes:
        return None
    return {
        "schemes": {name: scheme.to_json() for name, scheme in recipe.schemes.items()},
        "input_scales": dict(quantization(recipe).input_scales),
        "nbits": sorted(recipe.nbits),
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
        nbits=frozenset(facts["nbits"]),
        tensors={
            group.name + INPUT_SCALE: torch.tensor(scales[group.readers[0]])
            for group in groups(manifest.model)
            if group.readers[0] in scales
        },
    )


def _nearest(
    spec: ModelSpec, precision: str, options: QuantizeOptions, *, cpu: bool
) -> Mapping[str, Scheme]:
    if precision in CALIBRATED:
        raise UsageError(
            f"The precision {precision} rounds activations, whose ranges only samples of text can "
            f"tell. Run `mistralc calibrate CHECKPOINT -o TABLE --precision {precision}`, and "
            "export with --calibration TABLE."
        )
    block = options.block or (CPU_BLOCK if cpu else ENGINE_BLOCK if precision == "int4wo" else None)
    offset = cpu and precision == "int4wo" and not options.symmetric
    scheme = default_scheme(precision, block=block, offset="zero_point" if offset else "none")
    return {name: scheme for group in groups(spec) for name in group.readers}


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


def _with_head(recipe: Recipe, checkpoint: Checkpoint, *, cpu: bool) -> Recipe:
    """Keep the output layer in 8 bits, in the blocks of a GGUF file if those are 8 bits already."""
    tied = recipe.spec.tie_word_embeddings
    name = EMBEDDING if tied else HEAD
    if tied and (not cpu or recipe.spec.hidden_size % CPU_BLOCK):
        return recipe
    scheme = default_scheme("int8wo", block=CPU_BLOCK if cpu else None)
    recipe = replace(recipe, schemes={**recipe.schemes, name: scheme})
    if cpu and block_scheme(checkpoint.dtypes[name]) == scheme:
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


def _fitting(recipe: Recipe, *, cpu: bool) -> Mapping[str, Scheme]:
    """Give every linear a block that the target can take. Raises UsageError where none fits."""
    shapes = recipe.spec.weight_shapes()
    found = {}
    for name, scheme in recipe.schemes.items():
        columns = shapes[name][1]
        if cpu and scheme.block is None and scheme.activation is None:
            scheme = _per_row_in_blocks(scheme)
        if not cpu and scheme.block is not None and columns % scheme.block:
            scheme = _smaller(scheme, name, columns, decided=recipe.calibrated(name))
        found[name] = scheme
    return found


def _per_row_in_blocks(scheme: Scheme) -> Scheme:
    """Return the nearest thing that `MatMulNBits` takes to one scale for each row."""
    return replace(scheme, block=CPU_BLOCK)


def _smaller(scheme: Scheme, name: str, columns: int, *, decided: bool) -> Scheme:
    fits = [size for size in BLOCKS if scheme.block and size < scheme.block and not columns % size]
    if not fits or decided:
        raise UsageError(
            f"{name} has {columns} columns, which blocks of {scheme.block} do not divide, as "
            f"TensorRT wants them to. {'Calibrate' if decided else 'Export'} with a --block that "
            "does, or choose int8wo."
        )
    return replace(scheme, block=max(fits))
