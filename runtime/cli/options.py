"""Command-line options that several commands share. Knows no command.

Each is declared once, with its help, so that `generate` and `chat` cannot drift apart.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from graphs.errors import UsageError
from runtime.decoding.sampling import SamplingParams

BundlePath = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="A directory that export wrote.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for machines.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Threads of the backend; one per physical core if left out."),
]
NoCheck = Annotated[
    bool, typer.Option("--no-check", help="Load without replaying the known text of the bundle.")
]
RequireSignature = Annotated[
    Path | None,
    typer.Option("--require-signature", metavar="KEY",
                 help="Refuse a bundle that this key did not sign; $MISTRALC_REQUIRE_SIGNATURE "
                 "if left out."),
]  # fmt: skip
MaxNewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", "-n", min=1, help="Most tokens of an answer.")
]
Speculate = Annotated[
    int,
    typer.Option(min=0, metavar="N", help="Guess up to N tokens ahead where the text repeats. Near "
                 "ties may fall otherwise, save in bundles exported with --batch-invariant."),
]  # fmt: skip
SessionFile = Annotated[
    Path | None,
    typer.Option(
        "--session", help="Go on from the text in this file, where it exists; keep the text there."
    ),
]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends the answer; repeatable.")]
System = Annotated[str | None, typer.Option(help="System message before the chat.")]

_SAMPLING = "Sampling"
Temperature = Annotated[
    float | None,
    typer.Option("--temperature", "-t", help="0 is greedy.", rich_help_panel=_SAMPLING),
]
TopK = Annotated[
    int | None, typer.Option(help="Keep the K likeliest; 0 is off.", rich_help_panel=_SAMPLING)
]
TopP = Annotated[
    float | None, typer.Option(help="Keep the likeliest that reach P.", rich_help_panel=_SAMPLING)
]
MinP = Annotated[
    float | None,
    typer.Option(help="Keep what has P times the best's chance.", rich_help_panel=_SAMPLING),
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Above 1 discourages all seen.", rich_help_panel=_SAMPLING)
]
PresencePenalty = Annotated[
    float | None, typer.Option(help="Subtracted once generated.", rich_help_panel=_SAMPLING)
]
FrequencyPenalty = Annotated[
    float | None, typer.Option(help="Subtracted per time generated.", rich_help_panel=_SAMPLING)
]
Seed = Annotated[int | None, typer.Option(help="Same seed, same text.", rich_help_panel=_SAMPLING)]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(metavar="ID=BIAS", help="Add to a token's logit; repeatable.",
                 rich_help_panel=_SAMPLING),
]  # fmt: skip
LogProbs = Annotated[
    int | None,
    typer.Option("--logprobs", help="Report N likeliest per token; needs --json.",
                 rich_help_panel=_SAMPLING),
]  # fmt: skip


def chosen(logit_bias: list[str] | None = None, **given: Any) -> dict[str, Any]:
    """What the user gave (not None), checked, so that a wrong value is refused before loading."""
    values = {name: value for name, value in given.items() if value is not None}
    values["logit_bias"] = dict(map(_bias, logit_bias or []))
    SamplingParams(**values)
    return values


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError as error:
        raise UsageError(
            f"--logit-bias is {text!r}; TOKEN_ID=BIAS is expected, for example 42=-100."
        ) from error
