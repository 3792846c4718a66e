"""How the weight of one linear is stored, and which linears are quantized together.

A `Scheme` describes one quantized linear; a precision such as `int4wo` uses one scheme for every
linear of the layers. Linears that read the same value form a `Group`: they are calibrated together
and share a scheme, so that a pass can still merge them.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, Self

from graphs.dtypes import ELEMENT_TYPES, Codes, Dtype
from graphs.errors import MistralcError, UsageError
from graphs.precisions import precision_named, quantized_precisions
from graphs.spec import ModelSpec
from graphs.targets import CodeLayout

Offset = Literal["none", "zero_point", "minimum"]

BLOCKS = (32, 64, 128)
SCALE, ZERO_POINT, MINIMUM = "_scale", "_zero_point", "_minimum"  # after the weight's name


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How the weight [N, K] of a linear is stored, and how its input is rounded.

    A weight is `scale * (code - zero_point) + minimum`. `block` input features share a scale; None
    means one scale per row. `offset` says which of the other two terms exists: a `zero_point` is an
    integer in the range of the codes, a `minimum` is any number (as in GGUF's Q4_1). `activation`
    is the type that the input is rounded to, with one static scale for the whole tensor; None
    leaves the input as it is.
    """

    codes: Codes
    block: int | None = None
    offset: Offset = "none"
    activation: Codes | None = None

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return ELEMENT_TYPES[self.codes].bits

    def blocks(self, columns: int) -> int:
        """Number of scales in a row of K = `columns` weights."""
        return 1 if self.block is None else -(-columns // self.block)

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote. Raises MistralcError if the data is not a valid scheme."""
        try:
            scheme = cls(**data)
            known = _is_code(scheme.codes) and scheme.offset in ("none", "zero_point", "minimum")
            known &= scheme.block is None or (type(scheme.block) is int and scheme.block > 0)
            known &= scheme.activation is None or _is_code(scheme.activation)
        except TypeError:  # an unknown field, or a value of another type
            known = False
        if not known:
            raise MistralcError(
                f"A weight's scheme is {data!r:.120}; expected codes, block, offset and activation "
                "as mistralc writes them. Export or calibrate again."
            )
        return scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Linears of one layer that share their input, and the weight that a scale can be folded into.

    Dividing input feature k by s[k] and multiplying column k of every reader by s[k] leaves the
    result unchanged. The division is folded into `producer`: the gain of a norm, or the rows of a
    linear and its bias. That is exact in every family: what lies between the two, the average of
    values that attention takes and the product with an activated gate, is linear in the producer.
    """

    name: str  # such as `model.layers.0.qkv`
    readers: tuple[str, ...]  # canonical weight names, [N, K] each
    producer: str
    producer_bias: str | None = None

    @property
    def divided(self) -> tuple[str, ...]:
        """The weights that the division is folded into."""
        return (
            (self.producer,) if self.producer_bias is None else (self.producer, self.producer_bias)
        )

    @property
    def layer(self) -> int:
        """Index of its decoder layer."""
        return int(self.name.split(".")[2])


def layer_groups(spec: ModelSpec, layer: int) -> tuple[Group, ...]:
    """The four groups of a decoder layer, in order of computation."""
    at = f"model.layers.{layer}."
    norm = "pre_feedforward_layernorm" if spec.post_norms else "post_attention_layernorm"
    v_bias = f"{at}self_attn.v_proj.bias" if spec.attention.bias else None
    up_bias = f"{at}mlp.up_proj.bias" if spec.mlp_bias else None
    q, k, v, o = (f"{at}self_attn.{name}_proj.weight" for name in "qkvo")
    gate, up, down = (f"{at}mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
    return (
        Group(name=f"{at}qkv", readers=(q, k, v), producer=f"{at}input_layernorm.weight"),
        Group(name=f"{at}o", readers=(o,), producer=v, producer_bias=v_bias),
        Group(name=f"{at}gate_up", readers=(gate, up), producer=f"{at}{norm}.weight"),
        Group(name=f"{at}down", readers=(down,), producer=up, producer_bias=up_bias),
    )  # fmt: skip


def groups(spec: ModelSpec) -> Iterator[Group]:
    """Every group of the model, layer by layer."""
    for layer in range(spec.num_hidden_layers):
        yield from layer_groups(spec, layer)


def default_scheme(precision: str, *, block: int | None, offset: Offset = "none") -> Scheme:
    """Return the scheme of a quantized precision.

    `block` counts only if activations are not rounded, `offset` only if the precision may have
    zero points. Raises UsageError for a precision that quantizes nothing.
    """
    found = precision_named(precision)
    if found.codes is None:
        raise UsageError(
            f"--precision is {precision!r}, which stores weights as floats; expected a quantized "
            f"precision, one of {', '.join(quantized_precisions())}."
        )
    if found.activation_codes is not None:
        return Scheme(codes=found.codes, activation=found.activation_codes)
    if found.blockwise and block is None:
        block = BLOCKS[0]
    return Scheme(codes=found.codes, block=block, offset=offset if found.zero_points else "none")


class StoredPart(NamedTuple):
    """One tensor that a quantized weight is stored as: its name, shape and element type."""

    name: str
    shape: tuple[int, ...]
    element: str  # a Dtype, `int4` (two to a byte), `int8`, `uint8` or `float8e4m3`

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return ELEMENT_TYPES[self.element].nbytes(math.prod(self.shape))


def stored_parts(
    name: str, shape: tuple[int, ...], scheme: Scheme, activation: Dtype, layout: CodeLayout
) -> Iterator[StoredPart]:
    """Yield the tensors that a weight [N, K] is stored as, codes first.

    Layout `onnx` has codes [N, K] as ONNX stores them. `transposed` has codes [K, N] and scales
    [J, N], with neighbours along N in one byte: ONNX Runtime would otherwise transpose int8 codes
    one by one at load time, which took 3.4 of 3.6 s for SmolLM2, and TensorRT-RTX keeps a second,
    transposed copy of all codes while it builds. `nbits` is the form of `MatMulNBits`: unsigned
    codes in whole blocks [N, J, bytes of a block], the last block padded if the block size does not
    divide K, and zero points packed alike.
    """
    n, k = shape
    blocks, bits = scheme.blocks(k), scheme.bits
    if layout == "transposed" and (scheme.offset != "none" or n * bits % 8):
        raise ValueError(f"{name}: {n} rows with offset {scheme.offset} cannot be transposed")
    if layout == "nbits":
        if scheme.block is None:
            raise ValueError(f"{name}: MatMulNBits takes blocks, not one scale for each row")
        yield StoredPart(name, (n, blocks, scheme.block * bits // 8), "uint8")
    else:
        yield StoredPart(name, (k, n) if layout == "transposed" else shape, scheme.codes)
    scales = (n,) if scheme.block is None else (n, blocks)
    if layout == "transposed":
        scales = scales[::-1]
    yield StoredPart(name + SCALE, scales, activation)
    if scheme.offset == "zero_point":
        yield StoredPart(name + ZERO_POINT, (n, -(-blocks * bits // 8)), "uint8")
    if scheme.offset == "minimum":
        yield StoredPart(name + MINIMUM, (n, blocks), activation)


def _is_code(name: object) -> bool:
    element = ELEMENT_TYPES.get(name) if isinstance(name, str) else None
    return element is not None and element.lowest is not None
