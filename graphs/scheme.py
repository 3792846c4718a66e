"""How a linear's numbers are stored, and which linears belong together. Knows no tensor.

A `Scheme` says what one quantized linear looks like; a precision such as `int4wo` is a scheme for
every linear of the layers. Linears that read the same value, or whose scales can be moved into the
layer before, form a `Group`: they are calibrated together and share one scheme, so that a pass may
still merge them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from graphs.errors import UsageError
from graphs.spec import ModelSpec

Codes = Literal["int4", "int8", "float8e4m3"]
Offset = Literal["none", "zero_point", "minimum"]

LEAST: Mapping[Codes, float] = {"int4": -8, "int8": -128, "float8e4m3": -448.0}
MOST: Mapping[Codes, float] = {"int4": 7, "int8": 127, "float8e4m3": 448.0}
BLOCKS = (32, 64, 128)


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
        return 1 if self.block is None else columns // self.block

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        return cls(**data)


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
