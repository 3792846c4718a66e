"""The command `mistralc calibrate`. Knows only the command line.

The table appears whole or not at all. What is finished before that lies beside it, in
`TABLE.partial`, from where the same command goes on after it was stopped.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from exporter.cli.export import program
from graphs.errors import UsageError
from runtime.cli import options
from runtime.system.progress import stage_for

if TYPE_CHECKING:
    from calib.layers.samples import Samples
    from exporter.checkpoint.open import Checkpoint
    from exporter.quantization.calibration_table import CalibrationTable

_TEXT, _KEEP = "Samples", "Groups in higher precision"


def calibrate(
    *,
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Directory, .gguf file, or `smollm2`.")
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="TABLE", help="Directory that is written."),
    ],
    precision: Annotated[
        str, typer.Option(help="What export will be asked for: int8, int8wo, int4wo or fp8.")
    ],
    method: Annotated[
        str | None,
        typer.Option(help="gptq, awq+gptq or awq for weights only; smoothquant+gptq, smoothquant "
                     "or nearest for int8 and fp8. The first is the default."),
    ] = None,
    calibrator: Annotated[
        str,
        typer.Option(help="Range of rounded inputs: mse, percentile, entropy or absmax."),
    ] = "mse",
    block: Annotated[
        int | None, typer.Option(help="Input features that share a scale: 32, 64 or 128.")
    ] = None,
    zero_points: Annotated[
        bool, typer.Option("--zero-points", help="Let int4wo have them; engines take none.")
    ] = False,
    text: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", rich_help_panel=_TEXT,
                     help="Text in UTF-8, or .jsonl with `text` or `messages`; repeatable. A part "
                     "of Python's documentation if left out."),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, rich_help_panel=_TEXT, help="Windows of text; 16,384 tokens in all if "
                     "left out."),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(min=2, rich_help_panel=_TEXT, help="Tokens of a window: more than a sliding "
                     "model sees. 512, or a quarter more than its window."),
    ] = None,
    keep_share: Annotated[
        float | None,
        typer.Option(metavar="SHARE", rich_help_panel=_KEEP,
                     help="Keep at most this share of the linears, 0.1 for a tenth."),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(metavar="NATS", rich_help_panel=_KEEP,
                     help="Keep as many as it takes to diverge by at most this a token."),
    ] = None,
    max_ppl_increase: Annotated[
        float | None,
        typer.Option(metavar="RATIO", rich_help_panel=_KEEP,
                     help="Keep as many as it takes to lose at most this; 0.03 is 3% perplexity."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; a GPU if PyTorch has one.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a table that is there.")] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:  # fmt: skip
    """Decide scales, codes and ranges from samples of text, a layer at a time."""
    from calib.layers.calibrate import CalibrationOptions
    from calib.layers.calibrate import calibrate as run
    from calib.layers.mixed_precision import Budget
    from exporter.bundle.staging import staged
    from exporter.checkpoint.open import open_checkpoint

    chosen = CalibrationOptions(
        precision=precision, method=method, block=block, calibrator=calibrator,
        offset="zero_point" if zero_points else "none", device=device,
        budget=Budget(share=keep_share, max_kl=max_kl, max_ppl_increase=max_ppl_increase),
    )  # fmt: skip
    _check_destination(output, force=force)
    opened = open_checkpoint(checkpoint)
    found = _samples(opened, text or [], samples, length)
    partial = output.with_name(output.name + ".partial")
    table = run(opened, found, chosen, partial, stage_for(quiet=quiet or as_json))
    with staged(output) as directory:
        table.write(directory)
    shutil.rmtree(partial, ignore_errors=True)
    if as_json:
        print(json.dumps({"table": str(output), "fingerprint": table.fingerprint,
                          "data": dict(table.data), "facts": dict(table.facts)}))  # fmt: skip
    else:
        print(_report(table, output))
        print("Next:")
        print(f"  {program()} export {checkpoint} --precision {precision} --calibration {output}")


def _check_destination(destination: Path, *, force: bool) -> None:
    """Raise unless a table may be written there. Only another table is ever replaced."""
    from exporter.quantization.calibration_table import JSON_NAME

    if not destination.exists() and not destination.is_symlink():
        return
    if not (destination / JSON_NAME).is_file():
        raise UsageError(
            f"{destination} exists and is not a calibration table, so it is left alone. Choose "
            "another name."
        )
    if not force:
        raise UsageError(
            f"There is a calibration table at {destination} already. Choose another name, or add "
            "--force to replace it once the new one is complete."
        )


def _samples(
    checkpoint: "Checkpoint", text: list[Path], count: int | None, length: int | None
) -> "Samples":
    import torch

    from calib.layers.samples import (
        TOTAL_TOKENS,
        Samples,
        check_length,
        default_length,
        evenly_spaced,
    )
    from exporter.checks.corpus import read_corpus, windows
    from exporter.tokenizer.read import read_tokenizer

    length = length or default_length(checkpoint.spec)
    check_length(length, checkpoint.spec)
    tokenizer = read_tokenizer(checkpoint.path).open()
    corpus = read_corpus(text, tokenizer, "calibration")
    ids = evenly_spaced(
        torch.from_numpy(windows(corpus, length)), count or max(1, TOTAL_TOKENS // length)
    )
    data = {"source": corpus.source, "fingerprint": corpus.fingerprint, "windows": len(ids),
            "length": length}  # fmt: skip
    return Samples(ids=ids, data=data)


def _report(table: "CalibrationTable", output: Path) -> str:
    """What was made, in a few lines."""
    data, facts = table.data, table.facts
    lines = [
        f"{output}: {table.precision} by {table.method}, {len(table.schemes)} linears.",
        f"Samples: {data['windows']} windows of {data['length']:,} tokens of {data['source']}.",
    ]
    lines += [
        f"Beyond the window of {entry['window']:,} lie {entry['beyond']:,} of its "
        f"{entry['tokens']:,} tokens."
        for entry in facts["coverage"]
        if entry["window"] is not None
    ]
    kept: dict[str, Any] | None = facts.get("kept")
    if kept is not None:
        lines.append(
            f"Kept in higher precision: {', '.join(kept['groups']) or 'none'}. Divergence "
            f"{kept['kl']:.4f} nats a token, perplexity {kept['ppl_increase']:+.1%} on "
            f"{kept['tokens']:,} tokens."
        )
    return "\n".join(lines)
