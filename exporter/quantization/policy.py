"""Which weights a precision quantizes, and how, told from the model's shape. Knows no tensor.

The linears of the layers are always quantized, norms never. The output layer is stored in 8 bits,
in 4 or as it is, as asked; for engines only by the precisions that quantize weights alone, and only
where it is not the embedding too, which on the CPU is looked up among the same codes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from graphs.errors import UsageError
from graphs.quant_scheme import BLOCKS, QUANTIZED, Layout, Scheme, default_scheme, groups
from graphs.spec import Dtype, ModelSpec
from runtime.bundle.sizes import weight_bytes

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
CALIBRATED = ("int8", "fp8")  # they round activations too, whose ranges only samples can tell
HEAD_BITS = (8, 4)
ENGINE_BLOCK, CPU_BLOCK = 128, 32  # input features; of int4wo, and of int8wo on the CPU


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """What the user may choose about a quantized precision.

    `block` is for weights without a table. `symmetric` leaves zero points out where there may be
    some; TensorRT takes none. `keep` names linears to leave alone; there is only `lm_head` so far,
    which else is stored in `head_bits`, on the CPU in blocks of `head_block`.
    """

    block: int | None = None
    symmetric: bool = False
    keep: tuple[str, ...] = ()
    head_bits: int = 8
    head_block: int | None = None

    def __post_init__(self) -> None:
        for option, block in (("--block", self.block), ("--head-block", self.head_block)):
            if block is not None and block not in BLOCKS:
                known = ", ".join(map(str, BLOCKS))
                raise UsageError(f"{option} is {block}; one of {known} is expected.")
        if self.head_bits not in HEAD_BITS:
            known = " or ".join(map(str, HEAD_BITS))
            raise UsageError(f"--head-bits is {self.head_bits}; {known} is expected.")
        unknown = set(self.keep) - {"lm_head"}
        if unknown:
            raise UsageError(f"--keep is {sorted(unknown)[0]!r}; lm_head is expected.")


def quantized_bytes(spec: ModelSpec, target: str, precision: str, activation: Dtype) -> int:
    """Bytes of all weights with their scales, in a precision that needs no look at the weights.

    Blocks that a GGUF file brings along may have minimums where zero points are counted here.
    """
    options = QuantizeOptions()
    schemes = layer_schemes(spec, target, precision, options)
    head = output_scheme(spec, target, precision, options)
    schemes = {**schemes, **dict([head] if head else [])}
    schemes = fitting(spec, target, schemes, decided=lambda _: False)
    return sum(weight_bytes(spec, schemes, layouts(target, schemes), activation).values())


def layouts(target: str, schemes: Mapping[str, Scheme]) -> dict[str, Layout]:
    """How codes lie for ONNX Runtime CPU; the other targets take them as ONNX stores them."""
    found: dict[str, Layout] = {}
    for name, scheme in schemes.items() if target == "cpu" else ():
        if scheme.activation is None:
            found[name] = "nbits"
        elif scheme.codes == "int8":
            found[name] = "turned"
    return found


def layer_schemes(
    spec: ModelSpec, target: str, precision: str, options: QuantizeOptions
) -> Mapping[str, Scheme]:
    """Return the scheme of every linear of the layers, by weight name."""
    cpu = target == "cpu"
    block = options.block or (CPU_BLOCK if cpu else ENGINE_BLOCK if precision == "int4wo" else None)
    offset = cpu and precision == "int4wo" and not options.symmetric
    scheme = default_scheme(precision, block=block, offset="zero_point" if offset else "none")
    return {name: scheme for group in groups(spec) for name in group.readers}


def output_scheme(
    spec: ModelSpec, target: str, precision: str, options: QuantizeOptions
) -> tuple[str, Scheme] | None:
    """Return the output layer's weight and scheme, or None where it stays in floats.

    Raises UsageError for a block that the target, or the lookup in a tied embedding, cannot take.
    """
    cpu, tied = target == "cpu", spec.tie_word_embeddings
    _check_head_block(options.head_block, spec, target)
    if precision not in QUANTIZED or "lm_head" in options.keep:
        return None
    if not cpu and (tied or precision in CALIBRATED):
        return None
    block = options.head_block or CPU_BLOCK
    if tied and spec.hidden_size % block:
        return None
    if options.head_bits == 8:
        scheme = default_scheme("int8wo", block=block if cpu else None)
    else:
        scheme = default_scheme("int4wo", block=block if cpu else ENGINE_BLOCK)
    return EMBEDDING if tied else HEAD, scheme


def _check_head_block(block: int | None, spec: ModelSpec, target: str) -> None:
    if block is None:
        return
    if target != "cpu":
        raise UsageError(
            f"--head-block was given for --target {target}, whose output layer has a scale for "
            "each row or no choice of blocks. Leave it out."
        )
    if spec.tie_word_embeddings and spec.hidden_size % block:
        raise UsageError(
            f"--head-block is {block}, which does not divide this model's {spec.hidden_size} "
            "features, as a tied embedding needs. Give a smaller one, or leave it out."
        )


def fitting(
    spec: ModelSpec, target: str, schemes: Mapping[str, Scheme],
    decided: Callable[[str], bool],
) -> Mapping[str, Scheme]:  # fmt: skip
    """Give every linear a block that the target can take.

    The blocks of those that are `decided`, by calibration, stay as they are. Raises UsageError
    where no block fits.
    """
    shapes, cpu = spec.weight_shapes(), target == "cpu"
    found = {}
    for name, scheme in schemes.items():
        columns = shapes[name][1]
        if cpu and scheme.block is None and scheme.activation is None:
            # The nearest thing that `MatMulNBits` takes to one scale for each row.
            scheme = replace(scheme, block=CPU_BLOCK)
        if not cpu and scheme.block is not None and columns % scheme.block:
            scheme = _smaller(scheme, name, columns, decided=decided(name))
        found[name] = scheme
    return found


def _smaller(scheme: Scheme, name: str, columns: int, *, decided: bool) -> Scheme:
    fits = [size for size in BLOCKS if scheme.block and size < scheme.block and not columns % size]
    if not fits or decided:
        raise UsageError(
            f"{name} has {columns} columns, which blocks of {scheme.block} do not divide, as "
            f"TensorRT wants them to. {'Calibrate' if decided else 'Export'} with a --block that "
            "does, or choose int8wo."
        )
    return replace(scheme, block=max(fits))
