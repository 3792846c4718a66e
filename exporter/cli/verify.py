"""The command verify. Knows only the command line."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from exporter.options import AdapterOptions
from graphs.errors import MistralcError, UsageError
from runtime.cli import options as common
from runtime.system.progress import stage_for


def verify(
    *,
    bundle: common.BundlePath,
    against: Annotated[
        str | None,
        typer.Option(metavar="CHECKPOINT",
                     help="Compare with this checkpoint instead of the bundle's own weights."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="TABLE",
                     help="With --against: the table that the bundle was made with."),
    ] = None,
    adapters: AdapterOptions,
    short: Annotated[
        bool, typer.Option("--short", help="Run only the quick cases that export runs.")
    ] = False,
    device: Annotated[
        str,
        typer.Option(metavar="cpu|cuda",
                     help="What computes the reference: the processor or the GPU."),
    ] = "cpu",
    require_signature: common.RequireSignature = None,
    as_json: common.Json = False,
    quiet: common.Quiet = False,
) -> None:  # fmt: skip
    """Compare a bundle with the PyTorch decoder, and record the result unless it is signed."""
    from exporter.checks import text_agreement as checks_text
    from exporter.checks import texts
    from exporter.checks import verify as checks
    from exporter.decoder.devices import reference_device
    from exporter.quantization.calibration_table import CalibrationTable
    from runtime.bundle.open import open_bundle
    from runtime.load import load_session

    _check(against, calibration, adapters)
    chosen = reference_device(device)
    stage = stage_for(quiet=quiet or as_json)
    with stage("Checking the bundle", None):
        manifest = open_bundle(bundle, require_signature=require_signature).manifest
    table = None if calibration is None else CalibrationTable.read(calibration)
    build = manifest.build
    with stage("Loading both", None):
        if against is None:
            reference = checks.bundle_reference(bundle, manifest, chosen)
        else:
            reference = checks.checkpoint_reference(against, manifest, table, chosen, adapters.lora)
        session = load_session(bundle, build, manifest.files)
    tokens = sum(case.tokens for case in texts.cases(build, short=short))
    with stage("Comparing", tokens) as advance:
        agreements = checks.verify(session, build, reference, short=short, progress=advance)
    text = manifest.text
    if against is not None:
        with stage("Comparing the tokenizer", None):
            text = checks_text.verify_text(bundle, against, adapters.lora, build.spec.vocab_size)
    source = "its own weights" if against is None else "the checkpoint"
    result = checks.to_json(agreements, source, texts.cases_left_out(build) if short else [])
    print(json.dumps(result) if as_json else checks.to_markdown(result))
    _record(bundle, result, text)
    checks.require(agreements)


def _check(against: str | None, calibration: Path | None, adapters: AdapterOptions) -> None:
    """Raise UsageError for options that have a meaning beside --against only."""
    adapters.require_checkpoint(against)
    if calibration is not None and against is None:
        raise UsageError(
            "--calibration was given without --against: a bundle's own weights are quantized "
            "already. Add --against CHECKPOINT, or leave it out."
        )


def _record(
    bundle: Path, verification: dict[str, object], text: Mapping[str, object] | None
) -> None:
    """Write the results into the bundle's manifest and report, unless the bundle is signed."""
    from dataclasses import replace

    from exporter.export import record
    from graphs.manifest import read_manifest
    from runtime.bundle.signature import read_signature

    if read_signature(bundle) is not None:
        typer.echo("The bundle is signed, so the result is not recorded in it.", err=True)
        return
    try:
        manifest = replace(read_manifest(bundle), verification=verification, text=text)
        record(manifest, bundle)
    except OSError as error:
        raise MistralcError(
            f"The result could not be written into {bundle} ({error}). Make it writable, and "
            "verify again."
        ) from error
