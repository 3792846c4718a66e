"""The options of calibrate, eval and report. Each option is declared here and nowhere else.

A field is both an option of the command line (name, type, help, default) and what the code reads;
`runtime/cli/option_fields.py` makes the option from the field. Imports nothing heavy, so that
`mistralc --help` answers at once.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from calib.methods.catalogue import (
    CALIBRATORS,
    FOR_ROUNDED_INPUTS,
    FOR_WEIGHTS_ONLY,
    Method,
    methods_for,
)
from graphs.errors import UsageError
from graphs.precisions import PRECISIONS, quantized_precisions
from graphs.quant_scheme import BLOCKS, Offset, Scheme, default_scheme

EVALUATION_LENGTH = 512  # tokens of a window; perplexities of different lengths do not compare

_SAMPLES, _HIGHER = "Samples", "Groups in higher precision"
_ROUNDED = [name for name in quantized_precisions() if PRECISIONS[name].needs_calibration]
_TEXT = (
    "UTF-8 text, or .jsonl with `text` or `messages`; repeatable (default: part of Python's "
    "documentation)."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOptions:
    """The text to calibrate on. None leaves a size to the model's window."""

    text: Annotated[
        tuple[Path, ...],
        typer.Option(metavar="FILE", rich_help_panel=_SAMPLES, help=_TEXT),
    ] = ()
    samples: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", rich_help_panel=_SAMPLES,
                     help="Windows of text (default: 16,384 tokens in all)."),
    ] = None  # fmt: skip
    length: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", rich_help_panel=_SAMPLES,
                     help="Tokens of a window, more than the model's sliding window (default: 512 "
                     "or a quarter more than that window)."),
    ] = None  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Limits on what quantization may cost. None is no limit; without any, all is quantized.

    `share` limits the linears kept, as a share of all linears; `max_kl` the divergence, in nats per
    token; `max_ppl_increase` the growth of perplexity, 0.03 for 3%. Raises UsageError for a limit
    that is negative or infinite.
    """

    share: Annotated[
        float | None,
        typer.Option("--keep-share", metavar="SHARE", rich_help_panel=_HIGHER,
                     help="Keep at most this share of the linears in higher precision; 0.1 is a "
                     "tenth."),
    ] = None  # fmt: skip
    max_kl: Annotated[
        float | None,
        typer.Option(metavar="NATS", rich_help_panel=_HIGHER,
                     help="Keep as many as needed to diverge by at most this per token."),
    ] = None  # fmt: skip
    max_ppl_increase: Annotated[
        float | None,
        typer.Option(metavar="RATIO", rich_help_panel=_HIGHER,
                     help="Keep as many as needed for perplexity to grow by at most this; 0.03 is "
                     "3%."),
    ] = None  # fmt: skip

    def __post_init__(self) -> None:
        for option, value in (("--keep-share", self.share), ("--max-kl", self.max_kl),
                              ("--max-ppl-increase", self.max_ppl_increase)):  # fmt: skip
            if value is not None and not 0 <= value < float("inf"):
                raise UsageError(f"{option} is {value}; expected a number of at least 0.")

    @property
    def is_set(self) -> bool:
        """Whether any limit is given."""
        return self.share is not None or self.needs_measurement

    @property
    def needs_measurement(self) -> bool:
        """Whether the whole model has to be measured to know if the budget is met."""
        return self.max_kl is not None or self.max_ppl_increase is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationOptions:
    """How to calibrate. None means the default of the precision or of the machine.

    Raises UsageError if a value is not among those allowed.
    """

    precision: Annotated[
        str,
        typer.Option(help=f"The precision to export with: {', '.join(quantized_precisions())}."),
    ]
    method: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(FOR_WEIGHTS_ONLY)} for weights only; "
                     f"{', '.join(FOR_ROUNDED_INPUTS)} for {' and '.join(_ROUNDED)} (default: the "
                     "first)."),
    ] = None  # fmt: skip
    calibrator: Annotated[
        str,
        typer.Option(help=f"How to choose the range of rounded inputs: {', '.join(CALIBRATORS)}."),
    ] = CALIBRATORS[0]
    block: Annotated[
        int | None,
        typer.Option(metavar="|".join(map(str, BLOCKS)),
                     help="Input features that share a scale; for weights only."),
    ] = None  # fmt: skip
    zero_points: Annotated[
        bool,
        typer.Option("--zero-points", help="Give int4wo zero points, which engines do not take."),
    ] = False
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda (default: a GPU if PyTorch can use one).")
    ] = None
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        _require("--precision", self.precision, quantized_precisions())
        _require("--method", self.method_name, methods_for(self.precision))
        _require("--calibrator", self.calibrator, CALIBRATORS)
        if self.block is not None:
            _require("--block", self.block, BLOCKS)

    @property
    def method_name(self) -> str:
        """Name of the method: the given one, or the precision's default."""
        return self.method or next(iter(methods_for(self.precision)))

    @property
    def chosen_method(self) -> Method:
        """The method of that name."""
        return methods_for(self.precision)[self.method_name]

    @property
    def scheme(self) -> Scheme:
        """How every linear of the layers is quantized."""
        offset: Offset = "zero_point" if self.zero_points else "none"
        return default_scheme(self.precision, block=self.block, offset=offset)

    def to_json(self) -> dict[str, Any]:
        """Return, as plain data, what determines the numbers of a group. The budget does not."""
        return {"precision": self.precision, "method": self.method_name,
                "calibrator": self.calibrator, "scheme": self.scheme.to_json()}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """The text to measure bundles on."""

    text: Annotated[tuple[Path, ...], typer.Option(metavar="FILE", help=_TEXT)] = ()
    length: Annotated[
        int | None,
        typer.Option(min=2, metavar="N",
                     help=f"Tokens of a window (default: {EVALUATION_LENGTH})."),
    ] = None  # fmt: skip
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Only the first N windows of the text.")
    ] = None

    @property
    def is_set(self) -> bool:
        """Whether any option is given."""
        return self != TextOptions()

    @property
    def length_or_default(self) -> int:
        """Tokens of a window."""
        return self.length or EVALUATION_LENGTH


def _require(option: str, value: object, known: Collection[object]) -> None:
    if value not in known:
        names = ", ".join(map(str, known))
        raise UsageError(f"{option} is {value!r}; expected one of {names}.")
