"""How a linear's numbers are stored, and which linears belong together. Knows no tensor.

A `Scheme` says what one quantized linear looks like; a precision such as `int4wo` is a scheme for
every linear of the layers. Linears that read the same value, or whose scales can be moved into the
layer before, form a `Group`: they are calibrated together and share one scheme, so that a pass may
still merge them.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, Self

from graphs.errors import MistralcError, UsageError
from graphs.spec import ITEM_SIZE, Dtype, ModelSpec

Codes = Literal["int4", "int8", "float8e4m3"]
Offset = Literal["none", "zero_point", "minimum"]
Layout = Literal["onnx", "turned", "nbits"]  # of a weight's codes; see `stored_parts`

LEAST: Mapping[Codes, float] = {"int4": -8, "int8": -128, "float8e4m3": -448.0}
MOST: Mapping[Codes, float] = {"int4": 7, "int8": 127, "float8e4m3": 448.0}
BLOCKS = (32, 64, 128)
ELEMENT_SIZE: Mapping[str, float] = {
    **ITEM_SIZE,
    "uint8": 1,
    "int8": 1,
    "float8e4m3": 1,
    "int4": 0.5,
}
SCALE, ZERO_POINT, MINIMUM = "_scale", "_zero_point", "_minimum"  # after the weight's name


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How the weight [N, K] of a linear is stored, and how its input is rounded.

    A weight is `scale * (code - zero_point) + minimum`. `block` input features share a scale;
    None is one scale for each of the N rows. `offset` says which of the other two there is: a
    `zero_point` is a whole number in the codes' range, a `minimum` is any number (the grid of
    GGUF's Q4_1). `activation`, if any, is the type the input is rounded to, with one static scale
    for the whole tensor.
    """

    codes: Codes
    block: int | None = None
    offset: Offset = "none"
    activation: Literal["int8", "float8e4m3"] | None = None

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return 4 if self.codes == "int4" else 8

    def blocks(self, columns: int) -> int:
        """How many scales a row of K = `columns` weights has."""
        return 1 if self.block is None else -(-columns // self.block)

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote. Raises MistralcError where it says what no scheme is."""
        try:
            scheme = cls(**data)
            known = scheme.codes in LEAST and scheme.offset in ("none", "zero_point", "minimum")
            known &= scheme.block is None or (type(scheme.block) is int and scheme.block > 0)
            known &= scheme.activation in (None, "int8", "float8e4m3")
        except TypeError:  # another field, or a value that is no plain one
            known = False
        if not known:
            raise MistralcError(
                f"A weight's scheme is {data!r:.120}; codes, block, offset and activation as "
                "mistralc writes them are expected. Export or calibrate again."
            )
        return scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Linears of one layer that share their input, and what a scale on that input is folded into.

    Dividing input feature k by s[k] and multiplying column k of every reader by it changes
    nothing. The division is folded into `producer`: the gain of a norm, or the rows of a linear.
    """

    name: str  # such as `model.layers.0.qkv`
    readers: tuple[str, ...]  # canonical weight names, [N, K] each
    producer: str

    @property
    def layer(self) -> int:
        """Index of its decoder layer."""
        return int(self.name.split(".")[2])


def layer_groups(layer: int) -> tuple[Group, ...]:
    """The four groups of a decoder layer, in the order in which they compute."""
    at = f"model.layers.{layer}."
    q, k, v, o = (f"{at}self_attn.{name}_proj.weight" for name in "qkvo")
    gate, up, down = (f"{at}mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
    return (
        Group(name=f"{at}qkv", readers=(q, k, v), producer=f"{at}input_layernorm.weight"),
        Group(name=f"{at}o", readers=(o,), producer=v),
        Group(
            name=f"{at}gate_up", readers=(gate, up),
            producer=f"{at}post_attention_layernorm.weight",
        ),
        Group(name=f"{at}down", readers=(down,), producer=up),
    )  # fmt: skip


def groups(spec: ModelSpec) -> Iterator[Group]:
    """Every group of the model, layer by layer."""
    for layer in range(spec.num_hidden_layers):
        yield from layer_groups(layer)


QUANTIZED = ("int8wo", "int4wo", "int8", "fp8")


def default_scheme(precision: str, *, block: int | None, offset: Offset = "none") -> Scheme:
    """Return the scheme of a quantized precision. `block` is ignored by `int8` and `fp8`."""
    match precision:
        case "int8wo":
            return Scheme(codes="int8", block=block)
        case "int4wo":
            return Scheme(codes="int4", block=block or 32, offset=offset)
        case "int8":
            return Scheme(codes="int8", activation="int8")
        case "fp8":
            return Scheme(codes="float8e4m3", activation="float8e4m3")
    raise UsageError(f"{precision!r} is no quantized precision; {', '.join(QUANTIZED)} are.")


class StoredPart(NamedTuple):
    """One tensor that a quantized weight is stored as: its name, shape and element type."""

    name: str
    shape: tuple[int, ...]
    element: str  # a Dtype, `int4` (two to a byte), `int8`, `uint8` or `float8e4m3`

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return int(math.prod(self.shape) * ELEMENT_SIZE[self.element])


def stored_parts(
    name: str, shape: tuple[int, ...], scheme: Scheme, activation: Dtype, layout: Layout
) -> Iterator[StoredPart]:
    """What a weight [N, K] is stored as, codes first.

    `onnx` are codes [N, K] as ONNX stores them, and `turned` the same as [K, N]: ONNX Runtime
    transposes int8 one by one while it loads, which took 3.4 of 3.6 s for SmolLM2. `nbits` is what
    its `MatMulNBits` takes: codes without a sign, from 0 up, whole blocks of bytes [N, J, bytes of
    a block], the last one filled up where the block does not divide K, and zero points packed
    likewise.
    """
    n, k = shape
    blocks, bits = scheme.blocks(k), scheme.bits
    if layout == "nbits":
        if scheme.block is None:
            raise ValueError(f"{name}: MatMulNBits takes blocks, not one scale for each row")
        yield StoredPart(name, (n, blocks, scheme.block * bits // 8), "uint8")
    else:
        yield StoredPart(name, (k, n) if layout == "turned" else shape, scheme.codes)
    scales = (n,) if scheme.block is None else (n, blocks)
    yield StoredPart(name + SCALE, scales, activation)
    if scheme.offset == "zero_point":
        yield StoredPart(name + ZERO_POINT, (n, -(-blocks * bits // 8)), "uint8")
    if scheme.offset == "minimum":
        yield StoredPart(name + MINIMUM, (n, blocks), activation)
