"""Precisions: what `--precision` may name, and how each stores weights and rounds activations.

Standard library only. To add one, add an entry here, and its arithmetic where its codes are new:
`docs/extending.md`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from graphs.dtypes import Codes, Dtype
from graphs.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """One precision.

    `codes` is what the linears' weights are stored in; None stores all weights in the type that the
    graph computes in. `activation_codes` is what the linears' inputs are rounded to, if anything:
    such a precision needs a calibration table. `blockwise` says whether each row always has a scale
    per block of input features; otherwise a target may use one scale per row. `zero_points` says
    whether weights may have zero points where a target supports them. `min_compute_capability` is
    the first NVIDIA generation whose tensor cores take the codes.
    """

    name: str
    summary: str
    codes: Codes | None = None
    activation_codes: Codes | None = None
    blockwise: bool = False
    zero_points: bool = False
    min_compute_capability: tuple[int, int] | None = None
    lossless_for: Dtype | None = None  # weights stored in this type keep every bit

    @property
    def quantized(self) -> bool:
        """Whether weights are stored as codes."""
        return self.codes is not None

    @property
    def weight_only(self) -> bool:
        """Whether weights are quantized and activations are not."""
        return self.quantized and self.activation_codes is None

    @property
    def needs_calibration(self) -> bool:
        """Whether activation ranges are needed, which only samples of text can tell."""
        return self.activation_codes is not None


PRECISIONS: Mapping[str, Precision] = {
    one.name: one
    for one in (
        Precision(name="fp32", summary="float32", lossless_for="float32"),
        Precision(name="fp16", summary="float16", lossless_for="float16"),
        Precision(name="bf16", summary="bfloat16", lossless_for="bfloat16"),
        Precision(name="int8wo", summary="8-bit weights", codes="int8"),
        Precision(name="int4wo", summary="4-bit weights", codes="int4", blockwise=True,
                  zero_points=True),
        Precision(name="int8", summary="8-bit weights and activations, calibrated", codes="int8",
                  activation_codes="int8"),
        Precision(name="fp8", summary="FP8 (E4M3) weights and activations, calibrated",
                  codes="float8e4m3", activation_codes="float8e4m3",
                  min_compute_capability=(8, 9)),
    )
}  # fmt: skip
"""By the name that `--precision` takes."""


def precision_named(name: str) -> Precision:
    """Look a precision up. Raises UsageError that lists the precisions there are."""
    if name not in PRECISIONS:
        raise UsageError(f"--precision is {name!r}; expected one of {', '.join(PRECISIONS)}.")
    return PRECISIONS[name]


def quantized_precisions() -> tuple[str, ...]:
    """Names of the precisions that store weights as codes."""
    return tuple(name for name, one in PRECISIONS.items() if one.quantized)
