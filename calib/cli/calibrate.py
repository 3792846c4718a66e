"""The command `mistralc calibrate`. Knows only the command line.

The table appears whole or not at all. Until then, finished layers are kept beside it in
`TABLE.partial`, from which the same command resumes if it is stopped.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from calib.options import CalibrationOptions, SampleOptions
from exporter.cli.arguments import CheckpointArgument
from exporter.options import AdapterOptions
from graphs.errors import UsageError
from runtime.cli import options as common
from runtime.cli.main import program_name
from runtime.system.progress import stage_for

if TYPE_CHECKING:
    from calib.layers.samples import Samples
    from exporter.checkpoint.open import Checkpoint
    from exporter.quantization.calibration_table import CalibrationTable


def calibrate(
    *,
    checkpoint: CheckpointArgument,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="TABLE", help="Directory to write."),
    ],
    sample_options: SampleOptions,
    options: CalibrationOptions,
    adapters: AdapterOptions,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing table.")] = False,
    as_json: common.Json = False,
    quiet: common.Quiet = False,
) -> None:
    """Decide scales, codes and ranges from samples of text, one layer at a time."""
    from calib.layers.calibrate import calibrate as run
    from exporter.bundle.staging import staged
    from exporter.checkpoint.open import open_checkpoint

    _check_destination(output, force=force)
    opened = open_checkpoint(checkpoint, adapters.lora)
    samples = _read_samples(opened, sample_options)
    partial = output.with_name(output.name + ".partial")
    table = run(opened, samples, options, partial, stage_for(quiet=quiet or as_json))
    with staged(output) as directory:
        table.write(directory)
    shutil.rmtree(partial, ignore_errors=True)
    if as_json:
        print(json.dumps({"table": str(output), "fingerprint": table.fingerprint,
                          "data": dict(table.data), "facts": dict(table.facts)}))  # fmt: skip
        return
    print(_summary(table, output))
    print("Next:")
    merged = "".join(f" --lora {one}" for one in adapters.lora)
    print(f"  {program_name()} export {checkpoint}{merged} --precision {options.precision} "
          f"--calibration {output}")  # fmt: skip


def _check_destination(destination: Path, *, force: bool) -> None:
    """Raise UsageError unless a table may be written there. Only tables are ever replaced."""
    from exporter.quantization.calibration_table import JSON_NAME

    if not destination.exists() and not destination.is_symlink():
        return
    if not (destination / JSON_NAME).is_file():
        raise UsageError(
            f"{destination} exists and is not a calibration table, so it is not replaced. Choose "
            "another name."
        )
    if not force:
        raise UsageError(
            f"There is a calibration table at {destination} already. Choose another name, or add "
            "--force to replace it once the new one is complete."
        )


def _read_samples(checkpoint: "Checkpoint", options: SampleOptions) -> "Samples":
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

    length = options.length or default_length(checkpoint.spec)
    check_length(length, checkpoint.spec)
    tokenizer = read_tokenizer(checkpoint.text, checkpoint.path).open()
    corpus = read_corpus(options.text, tokenizer, "calibration")
    count = options.samples or max(1, TOTAL_TOKENS // length)
    ids = evenly_spaced(torch.from_numpy(windows(corpus, length)), count)
    data = {"source": corpus.source, "fingerprint": corpus.fingerprint, "windows": len(ids),
            "length": length}  # fmt: skip
    return Samples(ids=ids, data=data)


def _summary(table: "CalibrationTable", output: Path) -> str:
    """Describe the written table in a few lines."""
    data, facts = table.data, table.facts
    lines = [
        f"{output}: {table.precision} by {table.method}, {len(table.schemes)} linears.",
        f"Samples: {data['windows']} windows of {data['length']:,} tokens of {data['source']}.",
    ]
    lines += [
        f"Beyond the window of {entry['window']:,}: {entry['beyond']:,} of {entry['tokens']:,} "
        "tokens."
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
