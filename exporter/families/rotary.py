"""Read the rotary embedding of a `config.json`: theta, scaling and rotated share. Knows no family.

Both spellings are read: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (4).
Missing numbers are filled in as transformers does (`modeling_rope_utils.py`).
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from exporter.fields import Fields
from graphs.errors import MistralcError
from graphs.rope import RopeScaling

DEFAULT_THETA = 10_000.0  # transformers, and llama.cpp for GGUF
_UNSCALED = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})


class Rotary(NamedTuple):
    """Theta, the scaling of frequencies, and the share of a head's features that is rotated."""

    theta: float
    scaling: RopeScaling | None
    share: float


class _Reader(NamedTuple):
    """The keys of one kind of scaling, and the function that reads them."""

    keys: frozenset[str]
    read: Callable[[Fields, Fields], RopeScaling]  # of the section, and of the whole file


def read_rotary(
    fields: Fields,
    theta: float = DEFAULT_THETA,
    *,
    partial: bool = False,
    also: frozenset[str] = frozenset(),
) -> Rotary:
    """Read the rotary embedding. A file may have both spellings if they agree.

    `theta` is the family's default, and `also` are keys that the family reads itself. Unless heads
    may be rotated in part (`partial`), a share other than 1 is refused.
    """
    sections = rotary_sections(fields)
    thetas = {part.number("rope_theta") for part in (fields, *sections) if part.has("rope_theta")}
    shares = {
        part.number("partial_rotary_factor")
        for part in (fields, *sections)
        if part.has("partial_rotary_factor")
    }
    scalings = {_scaling(section, fields, also) for section in sections}
    if len(thetas) > 1 or len(scalings) > 1 or len(shares) > 1:
        raise MistralcError(
            f"{fields.origin}: `rope_theta`, `rope_parameters` and `rope_scaling` contradict each "
            "other; expected the same rotary embedding in all of them. Keep the one that the model "
            "was trained with."
        )
    share = next(iter(shares), 1.0)
    if share > 1 or (share != 1 and not partial):
        raise MistralcError(
            f"{fields.origin}: `partial_rotary_factor` is {share}; expected "
            f"{'at most 1' if partial else '1, rotary embedding of the whole head'}. The README "
            "lists the models that are supported: use another checkpoint."
        )
    scaling = next(iter(scalings), None)
    return Rotary(next(iter(thetas), theta), scaling, share)


def rotary_sections(fields: Fields) -> list[Fields]:
    """Return the sections about rotary embedding that a file has, newest spelling first."""
    found = (fields.section(key) for key in ("rope_parameters", "rope_scaling"))
    return [section for section in found if section is not None]


def yarn_factor(factor: float, mscale: float = 1.0) -> float:
    """What YaRN multiplies cosines and sines by: 0.1 mscale ln(factor) + 1 (arXiv:2309.00071)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def longrope_factor(factor: float, original: int) -> float:
    """What LongRoPE multiplies cosines and sines by (arXiv:2402.13753, transformers)."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _scaling(section: Fields, fields: Fields, also: frozenset[str]) -> RopeScaling | None:
    types = {section.text(key) for key in ("rope_type", "type") if section.has(key)} or {"default"}
    if section.has("short_factor"):  # Phi-3 first called it `su`, then `yarn`
        types = {"longrope" if name in ("su", "yarn") else name for name in types}
    name = "/".join(sorted(types))
    if name not in _READERS and name != "default":
        raise MistralcError(
            f"{section.origin}: the rotary scaling is {name[:40]}; expected one of "
            f"{', '.join(('default', *_READERS))}. The README lists the models that are "
            "supported: use another checkpoint."
        )
    keys = _READERS[name].keys if name in _READERS else frozenset()
    section.reject_others(
        _UNSCALED | keys | also,
        f"The rotary scaling is {name}. The README lists the models that are supported: use "
        "another checkpoint.",
    )
    return None if name == "default" else _READERS[name].read(section, fields)


def _original(section: Fields, fields: Fields) -> int:
    """The trained length: beside the section as in Phi-3, in it, or the whole context."""
    key = "original_max_position_embeddings"
    for part in (fields, section):
        if part.has(key):
            return part.integer(key)
    return fields.integer("max_position_embeddings")


def _linear(section: Fields, _: Fields) -> RopeScaling:
    return RopeScaling(rope_type="linear", factor=section.number("factor"))


def _llama3(section: Fields, _: Fields) -> RopeScaling:
    scaling = RopeScaling(
        rope_type="llama3",
        factor=section.number("factor"),
        low_freq_factor=section.number("low_freq_factor"),
        high_freq_factor=section.number("high_freq_factor"),
        original_max_position_embeddings=section.integer("original_max_position_embeddings"),
    )
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise section.invalid("high_freq_factor", f"more than low_freq_factor, "
                              f"{scaling.low_freq_factor}")  # fmt: skip
    return scaling


def _yarn(section: Fields, fields: Fields) -> RopeScaling:
    original = _original(section, fields)
    factor = section.number("factor", fields.integer("max_position_embeddings") / original)
    if section.has("mscale") and section.has("mscale_all_dim"):
        attention = yarn_factor(factor, section.number("mscale"))
        attention /= yarn_factor(factor, section.number("mscale_all_dim"))
    else:
        attention = yarn_factor(factor)
    scaling = RopeScaling(
        rope_type="yarn",
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=section.number("beta_fast", 32.0),
        beta_slow=section.number("beta_slow", 1.0),
        truncate=section.flag("truncate", default=True),
        attention_factor=section.number("attention_factor", attention),
    )
    if scaling.beta_fast <= scaling.beta_slow:
        raise section.invalid("beta_fast", f"more than beta_slow, {scaling.beta_slow}")
    return scaling


def _longrope(section: Fields, fields: Fields) -> RopeScaling:
    original = _original(section, fields)
    factor = section.number("factor", fields.integer("max_position_embeddings") / original)
    return RopeScaling(
        rope_type="longrope",
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=section.number("attention_factor", longrope_factor(factor, original)),
        short_factor=section.numbers("short_factor"),
        long_factor=section.numbers("long_factor"),
    )


_READERS: Mapping[str, _Reader] = {
    "linear": _Reader(frozenset({"factor"}), _linear),
    "llama3": _Reader(
        frozenset(
            {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
        ),
        _llama3,
    ),
    "yarn": _Reader(
        frozenset(
            {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast",
             "beta_slow", "mscale", "mscale_all_dim", "truncate"}
        ),
        _yarn,
    ),
    "longrope": _Reader(
        frozenset(
            {"factor", "original_max_position_embeddings", "attention_factor", "short_factor",
             "long_factor"}
        ),
        _longrope,
    ),
}  # fmt: skip
