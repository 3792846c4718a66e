"""What a user may choose about an export. Each option is declared here and nowhere else.

A field is at once the option of the command line (name, type, help, default) and what the exporter
reads: `runtime.cli.option_fields` makes the first from the second. Imports nothing heavy, so that
`mistralc --help` answers at once.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from graphs.errors import UsageError
from graphs.precisions import PRECISIONS, quantized_precisions
from graphs.quant_scheme import BLOCKS
from graphs.targets import DEFAULT_TARGET, TARGETS, Target, target_named

HEAD_PRECISIONS = {8: "int8wo", 4: "int4wo"}
"""By `--head-bits`: the precision that the output layer is stored in."""

_PLANS = ", ".join(name for name, one in TARGETS.items() if one.holds_plan)
_ENGINES = f"Engines (--target {_PLANS})"
_QUANTIZED = f"Quantized precisions ({', '.join(quantized_precisions())})"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """Choices for a quantized precision. `block` and `symmetric` apply without a table only."""

    block: Annotated[
        int | None,
        typer.Option(metavar="32|64|128", rich_help_panel=_QUANTIZED,
                     help="Input features that share a scale."),
    ] = None  # fmt: skip
    symmetric: Annotated[
        bool,
        typer.Option("--symmetric", rich_help_panel=_QUANTIZED,
                     help="Store no zero points: smaller and less accurate. Engines never do."),
    ] = False  # fmt: skip
    keep: Annotated[
        tuple[str, ...],
        typer.Option(metavar="lm_head", rich_help_panel=_QUANTIZED,
                     help="Do not quantize the output layer."),
    ] = ()  # fmt: skip
    head_bits: Annotated[
        int,
        typer.Option(metavar="8|4", rich_help_panel=_QUANTIZED,
                     help="Bits of the output layer; 4 is faster and less accurate."),
    ] = 8  # fmt: skip
    head_block: Annotated[
        int | None,
        typer.Option(metavar="32|64|128", rich_help_panel=_QUANTIZED,
                     help="Input features of the output layer that share a scale (default: 32; 64 "
                     "is faster). CPU only."),
    ] = None  # fmt: skip

    def __post_init__(self) -> None:
        for option, block in (("--block", self.block), ("--head-block", self.head_block)):
            if block is not None and block not in BLOCKS:
                known = ", ".join(map(str, BLOCKS))
                raise UsageError(f"{option} is {block}; expected one of {known}.")
        if self.head_bits not in HEAD_PRECISIONS:
            known = " or ".join(map(str, HEAD_PRECISIONS))
            raise UsageError(f"--head-bits is {self.head_bits}; expected {known}.")
        unknown = set(self.keep) - {"lm_head"}
        if unknown:
            raise UsageError(f"--keep is {sorted(unknown)[0]!r}; expected lm_head.")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How TensorRT builds. `gpus` are names such as `sm89`; none means all that it supports."""

    gpus: Annotated[
        tuple[str, ...],
        typer.Option("--gpu", metavar="sm89,…", rich_help_panel=_ENGINES,
                     help="Build for these GPUs only (default: every GPU TensorRT-RTX supports)."),
    ] = ()  # fmt: skip
    weight_streaming: Annotated[
        bool,
        typer.Option("--weight-streaming", rich_help_panel=_ENGINES,
                     help="Let a GPU smaller than the model run it, at the speed of its host "
                     "link."),
    ] = False  # fmt: skip

    def __post_init__(self) -> None:
        names = tuple(name.strip() for given in self.gpus for name in given.split(","))
        object.__setattr__(self, "gpus", names)


@dataclass(frozen=True, slots=True, kw_only=True)
class GateOptions:
    """How much perplexity a quantized bundle may lose, measured on which text files.

    Without files the text is the part of Python's documentation that is for evaluation.
    """

    max_ppl_increase: Annotated[
        float,
        typer.Option(metavar="RATIO", rich_help_panel=_QUANTIZED,
                     help="Largest increase in perplexity at which a CPU bundle is published; 0.1 "
                     "is 10%."),
    ] = 0.1  # fmt: skip
    text: Annotated[
        tuple[Path, ...],
        typer.Option(metavar="FILE", rich_help_panel=_QUANTIZED,
                     help="Measure it on this text (default: Python's documentation)."),
    ] = ()  # fmt: skip

    def __post_init__(self) -> None:
        if not self.max_ppl_increase > 0:
            raise UsageError(
                f"--max-ppl-increase is {self.max_ppl_increase}; expected a number above 0, such "
                "as 0.1 for 10%."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterOptions:
    """Adapters to merge into the checkpoint, in this order: `ADAPTER` or `ADAPTER=WEIGHT`."""

    lora: Annotated[
        tuple[str, ...],
        typer.Option("--lora", metavar="ADAPTER[=WEIGHT]",
                     help="Merge this PEFT adapter (LoRA, rsLoRA, DoRA); may be given again."),
    ] = ()  # fmt: skip

    def require_checkpoint(self, against: str | None) -> None:
        """Raise UsageError if adapters are given and no checkpoint to merge them into."""
        if against is None and self.lora:
            raise UsageError(
                "--lora was given without --against: a bundle's own weights have its adapters "
                "merged. Add --against CHECKPOINT, or leave it out."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """Choices that decide what is built. None leaves a choice to the checkpoint and the target."""

    precision: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(PRECISIONS)} (default: the checkpoint's own type if the "
                     "target computes in it)."),
    ] = None  # fmt: skip
    window: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Use a sliding window of N tokens in every layer "
                     "(unlimited generation)."),
    ] = None  # fmt: skip
    context: Annotated[
        int | None,
        typer.Option(min=1, metavar="N",
                     help="Longest text, of a model without a window (default: 4096) or with a "
                     "longer one."),
    ] = None  # fmt: skip
    chunk: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Most prompt tokens per step.")
    ] = None
    max_batch: Annotated[
        int,
        typer.Option("--max-batch", "--batch", min=1, metavar="N",
                     help="Most sequences at the same time."),
    ] = 1  # fmt: skip
    batch_invariant: Annotated[
        bool,
        typer.Option("--batch-invariant",
                     help="Make logits bit-identical for any batch or step size, so --speculate "
                     "never changes the output. CPU only; 10-25% slower."),
    ] = False  # fmt: skip
    quantize: QuantizeOptions = field(default_factory=QuantizeOptions)
    adapters: AdapterOptions = field(default_factory=AdapterOptions)

    def __post_init__(self) -> None:
        for name in ("window", "context", "chunk", "max_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                option = "--" + name.replace("_", "-")
                raise UsageError(f"{option} is {value}; expected a whole number of at least 1.")
        if self.window is not None and self.context is not None:
            raise UsageError(
                "--window and --context exclude each other: a model with a window in every layer "
                "has no longest text. Give one of them."
            )

    def check(self, target: Target) -> None:
        """Raise UsageError for a choice that `target` does not have."""
        if self.precision is not None:
            target.activation(self.precision)
        if self.batch_invariant and not target.supports_batch_invariance:
            able = ", ".join(n for n, one in TARGETS.items() if one.supports_batch_invariance)
            raise UsageError(
                f"--batch-invariant was given for --target {target.name}; only {able} supports "
                "it. Leave it out, or choose that target."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions(BuildOptions):
    """Everything that a user may choose about an export."""

    target: Annotated[
        str,
        typer.Option(help="What runs it: "
                     + ", ".join(f"{name} ({one.title})" for name, one in TARGETS.items()) + "."),
    ] = DEFAULT_TARGET  # fmt: skip
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="TABLE", rich_help_panel=_QUANTIZED,
                     help="What `mistralc calibrate` wrote for this checkpoint."),
    ] = None  # fmt: skip
    gate: GateOptions = field(default_factory=GateOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    allow_faults: Annotated[
        bool,
        typer.Option("--allow-faults", rich_help_panel=_ENGINES,
                     help="Publish an engine that fails its audit."),
    ] = False  # fmt: skip
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False

    def __post_init__(self) -> None:
        BuildOptions.__post_init__(self)  # `super()` does not see through slots
        target = target_named(self.target)
        self.check(target)
        if not target.holds_plan and self.engine != EngineOptions():
            raise UsageError(
                f"Options of an engine were given for --target {target.name}, which builds none. "
                f"Leave them out, or choose a target that does: {_PLANS}."
            )
        if self.engine.gpus and not target.narrows_gpus:
            raise UsageError(
                f"--gpu was given for --target {target.name}, whose engine is always for the GPU "
                "it is built on. Leave it out."
            )

    @property
    def precision_or_default(self) -> str:
        """What to call the result before the checkpoint has been looked at."""
        target = TARGETS[self.target]
        choices = [name for name in target.activations if not PRECISIONS[name].quantized]
        return self.precision or (choices[0] if len(choices) == 1 else "half")
