"""Decide which weights a precision quantizes and how, from the model's shape alone.

The linears of the layers are always quantized, norms never. The output layer is stored in 8 bits,
in 4 bits or as floats, as the user chooses. A target may restrict that: engines quantize an output
layer only if it is not tied to the embedding and only in weight-only precisions; on the CPU a tied
embedding is looked up in the codes of the output layer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from exporter.options import HEAD_PRECISIONS, QuantizeOptions
from exporter.quantization.carry import StoredCodes
from graphs.dtypes import ELEMENT_TYPES
from graphs.errors import UsageError
from graphs.precisions import PRECISIONS, Precision
from graphs.quant_scheme import BLOCKS, Scheme, default_scheme, groups
from graphs.spec import EMBEDDING, HEAD, ModelSpec
from graphs.targets import CodeLayout, Target


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFacts:
    """What is known of a checkpoint's weights before they are read.

    `types` are the types that they are stored in, empty if unknown. `codes` has what is stored as
    codes, by weight; `method` names the quantization of a directory, None for floats and for GGUF.
    `calibrated` has the schemes that a calibration table decided, None without a table; `settled`
    are the weights whose numbers it decided too. `left_out` names the parts of the checkpoint that
    are not of the text model.
    """

    types: frozenset[str] = frozenset()
    codes: Mapping[str, StoredCodes] = field(default_factory=dict)
    method: str | None = None
    calibrated: Mapping[str, Scheme] | None = None
    settled: frozenset[str] = frozenset()
    left_out: tuple[str, ...] = ()


def layouts(
    spec: ModelSpec, target: Target, schemes: Mapping[str, Scheme]
) -> dict[str, CodeLayout]:
    """How the target's backend wants codes to lie, by weight, where that is not `onnx`.

    Raises UsageError for a scheme with an offset if only `MatMulNBits` could compute it.
    """
    shapes = spec.weight_shapes()
    found: dict[str, CodeLayout] = {}
    for name, scheme in schemes.items():
        layout: CodeLayout = "onnx"
        if scheme.activation is None and ELEMENT_TYPES[scheme.codes].is_integer:
            layout = target.weight_only_layout
        elif scheme.activation is not None and ELEMENT_TYPES[scheme.codes].is_integer:
            layout = target.rounded_integer_layout
        if layout != "nbits" and scheme.offset != "none":
            raise UsageError(
                f"{name} was calibrated with zero points, which {target.title} does not compute. "
                "Calibrate without --zero-points."
            )
        if layout == "transposed" and shapes[name][0] * scheme.bits % 8:
            layout = "onnx"  # an odd number of rows does not fill whole bytes
        if layout != "onnx":
            found[name] = layout
    return found


def layer_schemes(
    spec: ModelSpec, target: Target, precision: Precision, options: QuantizeOptions
) -> Mapping[str, Scheme]:
    """Return the scheme of every linear of the layers, by weight name."""
    blocks = precision.blockwise or target.always_blockwise
    block = options.block or (target.default_block if blocks else None)
    offset = target.zero_points and precision.zero_points and not options.symmetric
    scheme = default_scheme(precision.name, block=block, offset="zero_point" if offset else "none")
    return {name: scheme for group in groups(spec) for name in group.readers}


def output_scheme(
    spec: ModelSpec, target: Target, precision: Precision, options: QuantizeOptions
) -> tuple[str, Scheme] | None:
    """Return the output layer's weight and scheme, or None if it is stored as floats.

    Raises UsageError for a block that the target, or the lookup in a tied embedding, cannot take.
    """
    tied = spec.tie_word_embeddings
    _check_head_block(options.head_block, spec, target)
    if not precision.quantized or "lm_head" in options.keep:
        return None
    if tied and not target.quantizes_tied_embedding:
        return None
    if precision.needs_calibration and not target.quantizes_calibrated_head:
        return None
    head = HEAD_PRECISIONS[options.head_bits]
    blocks = target.always_blockwise or PRECISIONS[head].blockwise
    block = (options.head_block or target.default_block) if blocks else None
    if tied and block is not None and spec.hidden_size % block:
        return None
    return EMBEDDING if tied else HEAD, default_scheme(head, block=block)


def _check_head_block(block: int | None, spec: ModelSpec, target: Target) -> None:
    if block is None:
        return
    if not target.always_blockwise:
        raise UsageError(
            f"--head-block was given for --target {target.name}, whose output layer has one scale "
            "per row or a fixed block. Leave it out."
        )
    if spec.tie_word_embeddings and spec.hidden_size % block:
        raise UsageError(
            f"--head-block is {block}, which does not divide this model's {spec.hidden_size} "
            "features, as a tied embedding needs. Give a smaller one, or leave it out."
        )


def fitting(
    spec: ModelSpec, target: Target, schemes: Mapping[str, Scheme],
    decided: Callable[[str], bool],
) -> Mapping[str, Scheme]:  # fmt: skip
    """Give every linear a block that the target supports.

    Blocks that calibration has `decided` stay as they are. Raises UsageError if no block fits.
    """
    shapes = spec.weight_shapes()
    found = {}
    for name, scheme in schemes.items():
        columns = shapes[name][1]
        alone = scheme.activation is None and ELEMENT_TYPES[scheme.codes].is_integer
        if target.always_blockwise and scheme.block is None and alone:
            # The closest to one scale per row that the backend supports.
            scheme = replace(scheme, block=target.default_block)
        if not target.partial_blocks and scheme.block is not None and columns % scheme.block:
            scheme = _smaller(scheme, name, columns, target, decided=decided(name))
        found[name] = scheme
    return found


def _smaller(scheme: Scheme, name: str, columns: int, target: Target, *, decided: bool) -> Scheme:
    fits = [size for size in BLOCKS if scheme.block and size < scheme.block and not columns % size]
    if not fits or decided:
        other = target.default_precision if target.always_blockwise else "int8wo"
        raise UsageError(
            f"{name} has {columns} columns, which blocks of {scheme.block} do not divide, as "
            f"{target.title} requires. {'Calibrate' if decided else 'Export'} with a --block that "
            f"does, or choose {other}."
        )
    return replace(scheme, block=max(fits))
