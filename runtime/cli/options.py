"""Command-line options that several commands share. Defines no command.

Each option is declared once, with its help. Options that go together are the fields of a
dataclass, which `option_fields.py` turns into options and fills in.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphs.errors import UsageError
from runtime.decoding.sampling import SamplingParams
from runtime.system.progress import Stage

if TYPE_CHECKING:
    from runtime.bundle.open import Bundle
    from runtime.completion import Limits
    from runtime.load import Loaded

DEFAULT_NEW_TOKENS = 512  # so that a model which never ends its answer is stopped

BundlePath = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="A directory that export wrote.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress bars.")]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Threads of the backend (default: one per physical core)."),
]
NoCheck = Annotated[
    bool,
    typer.Option("--no-check", help="Load without replaying the bundle's golden tokens."),
]
RequireSignature = Annotated[
    Path | None,
    typer.Option("--require-signature", metavar="KEY",
                 help="Refuse a bundle that is not signed by this public key (default: "
                 "$MISTRALC_REQUIRE_SIGNATURE)."),
]  # fmt: skip
SessionFile = Annotated[
    Path | None,
    typer.Option("--session", help="Resume from this file if it exists, and save to it."),
]
SystemMessage = Annotated[
    str | None, typer.Option("--system", help="System message at the start of the chat.")
]

_SAMPLING = "Sampling"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How to load a bundle."""

    threads: Threads = None
    no_check: NoCheck = False
    require_signature: RequireSignature = None

    def load(self, source: "Path | Bundle", stage: Stage, *, rows: int = 1) -> "Loaded":
        """Check a bundle unless it is open already, and load it with `rows` rows.

        Raises as `runtime.load.load` does.
        """
        from runtime.load import load

        return load(
            source, rows=rows, threads=self.threads, check=not self.no_check,
            require_signature=self.require_signature, stage=stage,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitOptions:
    """When an answer ends, and how far ahead its tokens are guessed."""

    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Most tokens of an answer.")
    ] = DEFAULT_NEW_TOKENS
    stop: Annotated[
        tuple[str, ...], typer.Option(help="End the answer before this text; repeatable.")
    ] = ()
    speculate: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="Guess up to N tokens ahead where the text repeats. "
                     "May change which of two nearly equal tokens is chosen, unless the bundle "
                     "was exported with --batch-invariant."),
    ] = 0  # fmt: skip

    def limits(self) -> "Limits":
        """Limits of a completion. Raises UsageError for an empty stop string."""
        from runtime.completion import Limits

        return Limits(max_new_tokens=self.max_new_tokens, stop=self.stop, speculate=self.speculate)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How to choose tokens. None leaves a choice to the checkpoint's defaults.

    Raises UsageError for a value out of range, so that it is refused before anything is loaded.
    """

    temperature: Annotated[
        float | None,
        typer.Option("--temperature", "-t", rich_help_panel=_SAMPLING,
                     help="Divide the logits by this; 0 is greedy."),
    ] = None  # fmt: skip
    top_k: Annotated[
        int | None,
        typer.Option(rich_help_panel=_SAMPLING, help="Keep the K likeliest tokens; 0 is off."),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(rich_help_panel=_SAMPLING,
                     help="Keep the likeliest tokens whose probabilities add up to P; 1 is off."),
    ] = None  # fmt: skip
    min_p: Annotated[
        float | None,
        typer.Option(rich_help_panel=_SAMPLING,
                     help="Keep tokens at least P times as likely as the likeliest; 0 is off."),
    ] = None  # fmt: skip
    repetition_penalty: Annotated[
        float | None,
        typer.Option(rich_help_panel=_SAMPLING,
                     help="Above 1, discourage every token in the prompt or answer."),
    ] = None  # fmt: skip
    presence_penalty: Annotated[
        float | None,
        typer.Option(rich_help_panel=_SAMPLING,
                     help="Subtract this from the logit of each token in the answer."),
    ] = None  # fmt: skip
    frequency_penalty: Annotated[
        float | None,
        typer.Option(rich_help_panel=_SAMPLING,
                     help="Subtract this each time the token is in the answer."),
    ] = None  # fmt: skip
    seed: Annotated[
        int | None,
        typer.Option(rich_help_panel=_SAMPLING,
                     help="The same seed gives the same text (default: a random one)."),
    ] = None  # fmt: skip

    def __post_init__(self) -> None:
        SamplingParams(**self.given)

    @property
    def given(self) -> dict[str, Any]:
        """Values that the user gave, by their names in `SamplingParams`."""
        return _fields_that_are_set(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateSamplingOptions(SamplingOptions):
    """Sampling options of generate: those of chat, and those that concern single tokens."""

    logit_bias: Annotated[
        tuple[str, ...],
        typer.Option(metavar="ID=BIAS", rich_help_panel=_SAMPLING,
                     help="Add BIAS to the logit of token ID; repeatable."),
    ] = ()  # fmt: skip
    logprobs: Annotated[
        int | None,
        typer.Option("--logprobs", rich_help_panel=_SAMPLING,
                     help="Report the N likeliest tokens at each position; needs --json."),
    ] = None  # fmt: skip

    @property
    def given(self) -> dict[str, Any]:
        """Values that the user gave, by their names in `SamplingParams`."""
        biases = dict(map(_parse_bias, self.logit_bias))
        return {**_fields_that_are_set(self), "logit_bias": biases}


def _fields_that_are_set(options: SamplingOptions) -> dict[str, Any]:
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    return {name: value for name, value in values.items() if value is not None}


def _parse_bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError as error:
        raise UsageError(
            f"--logit-bias is {text!r}; expected TOKEN_ID=BIAS, for example 42=-100."
        ) from error
