"""How a model rotates queries and keys by their position. Standard library only.

Rotary embedding (Su et al. 2021, arXiv:2104.09864) turns pair i of a head's D features by
position * theta^(-2i/D). What checkpoints change about it are values here; the arithmetic is in
`exporter/decoder/rotary.py`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, get_args

from graphs.errors import MistralcError

RopeType = Literal["linear", "llama3", "yarn", "longrope"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How a checkpoint scales its rotary frequencies. Fields are those of `config.json`.

    `linear` divides every frequency by `factor` (Chen et al. 2023, arXiv:2306.15595); `llama3`
    divides the long wavelengths only and blends in between (Llama 3.1 model card); `yarn` blends
    over features instead (Peng et al. 2023, arXiv:2309.00071). `longrope` divides each frequency
    by a factor of its own (Ding et al. 2024, arXiv:2402.13753): `short_factor` for texts of up to
    `original_max_position_embeddings` tokens, `long_factor` for longer ones. Keys in a ring stay
    as they were rotated, so a bundle has one of the two: `is_long` says which.

    `attention_factor` multiplies cosines and sines.
    """

    rope_type: RopeType
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    is_long: bool = False

    def __post_init__(self) -> None:
        if self.rope_type not in get_args(RopeType):
            raise MistralcError(
                f"The rotary scaling is {self.rope_type!r:.40}; expected one of "
                f"{', '.join(get_args(RopeType))}. Check the checkpoint's configuration file."
            )
        for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
                     "attention_factor"):  # fmt: skip
            check_number(f"rotary scaling's {name}", getattr(self, name))
        check_count(
            "rotary scaling's original_max_position_embeddings",
            self.original_max_position_embeddings,
        )
        for name in ("truncate", "is_long"):
            check_flag(f"rotary scaling's {name}", getattr(self, name))
        for name in ("short_factor", "long_factor"):
            for value in getattr(self, name):
                check_number(f"rotary scaling's {name}", value)

    @property
    def factors(self) -> tuple[float, ...]:
        """The divisors of `longrope` that apply, one for each rotated pair."""
        return self.long_factor if self.is_long else self.short_factor

    @property
    def note(self) -> str | None:
        """What a user should know about `longrope` factors, if there are two sets of them."""
        if not self.long_factor:
            return None
        length = f"{self.original_max_position_embeddings:,}"
        if self.is_long:
            return f"factors for texts of more than {length} tokens, used for shorter ones too"
        return f"factors for texts of up to {length} tokens; a larger --context uses the others"

    def for_context(self, context: int | None) -> Self:
        """Return the scaling for texts of up to `context` tokens; None means of any length."""
        longer = context is None or context > self.original_max_position_embeddings
        if self.rope_type != "longrope" or not self.long_factor:
            return self
        return replace(self, is_long=longer)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read the plain data of a manifest, in which tuples are lists."""
        lists = {
            name: tuple(data[name]) for name in ("short_factor", "long_factor") if name in data
        }
        return cls(**{**data, **lists})


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """What is rotated. The defaults rotate every feature of every head, in all layers.

    `features` is how many features of a head are rotated, the first ones; None means all D.
    `layers_without` are the layers that rotate nothing. With `query_scale`, rotated queries at
    position p are multiplied by 1 + query_scale * log(1 + floor(p / query_scale_length)), as in
    Llama 4 and Ministral 3.
    """

    features: int | None = None
    layers_without: tuple[int, ...] = ()
    query_scale: float = 0.0
    query_scale_length: int = 8192

    def __post_init__(self) -> None:
        if self.features is not None:
            check_count("number of rotated features", self.features)
            if self.features % 2:
                raise MistralcError(
                    f"{self.features} features of a head are rotated; expected an even number, "
                    "because pairs are rotated. Check the checkpoint's configuration file."
                )
        if any(type(layer) is not int or layer < 0 for layer in self.layers_without):
            raise MistralcError(
                f"The layers without rotation are {self.layers_without!r:.80}; expected layer "
                "numbers from 0. Check the checkpoint's configuration file."
            )
        if self.query_scale != 0:
            check_number("scale of queries by position", self.query_scale)
        check_count("length that the scale of queries counts in", self.query_scale_length)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read the plain data of a manifest, in which tuples are lists."""
        layers = {"layers_without": tuple(data.get("layers_without", ()))}
        return cls(**{**data, **layers})


def is_count(value: object) -> bool:
    """Whether a value is a whole number of at least 1 that fits 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**63


def check_count(what: str, value: object) -> None:
    """Raise MistralcError unless the value is a whole number of at least 1."""
    if not is_count(value):
        raise MistralcError(
            f"The {what} is {value!r:.40}; expected a whole number of at least 1. Check the "
            "checkpoint's configuration, or export the bundle again."
        )


def check_number(what: str, value: object) -> None:
    """Raise MistralcError unless the value is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise MistralcError(
            f"The {what} is {value!r:.40}; expected a number above 0. Check the checkpoint's "
            "configuration, or export the bundle again."
        )


def check_flag(what: str, value: object) -> None:
    """Raise MistralcError unless the value is true or false."""
    if type(value) is not bool:
        raise MistralcError(
            f"The {what} is {value!r:.40}; expected true or false. Check the checkpoint's "
            "configuration, or export the bundle again."
        )


EVERYWHERE = Rope()
"""Every feature of every head is rotated, in all layers."""
