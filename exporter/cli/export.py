"""The command export. Knows only the command line."""

import json
from pathlib import Path
from typing import Annotated

import typer

from exporter.cli.arguments import CheckpointArgument
from exporter.options import ExportOptions
from runtime.cli import options as common
from runtime.cli.main import program_name
from runtime.system.progress import stage_for


def export(
    *,
    checkpoint: CheckpointArgument,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="BUNDLE",
                     help="Where to write (default: build/NAME-TARGET-PRECISION)."),
    ] = None,
    options: ExportOptions,
    repository: Annotated[
        Path | None,
        typer.Option("--triton", metavar="REPOSITORY",
                     help="Also write a Triton model repository, as the command triton does."),
    ] = None,
    as_json: common.Json = False,
    quiet: common.Quiet = False,
) -> None:  # fmt: skip
    """Compile a checkpoint into a bundle, verify it, and publish it whole or not at all."""
    from exporter.bundle.triton_repository import check_repository, write_repository
    from exporter.export import export as run

    if repository is not None:
        check_repository(repository)
    name = Path(checkpoint).resolve().name.removesuffix(".gguf") or "model"
    default = "-".join([name, options.target, options.precision_or_default])
    path = output or Path("build") / default
    manifest = run(checkpoint, path, options, stage_for(quiet=quiet or as_json))
    if repository is not None:
        write_repository(path, repository)
    if as_json:
        print(json.dumps({"bundle": str(path), "manifest": json.loads(manifest.to_text())}))
        return
    state = "verified" if manifest.verification else "to be verified on a host with its GPU"
    size = manifest.file_bytes / 1e6
    print(f"{path}: {size:,.0f} MB, {manifest.target}, {manifest.precision}, {state}.")
    for line in manifest.checkpoint.get("codes", "").splitlines():
        print(f"  {line}.")
    for note in (manifest.text or {}).get("notes", ()):
        print(f"Note: {note}.")
    print("Next:")
    print(f'  {program_name()} generate {path} --chat "What is the capital of France?"')
