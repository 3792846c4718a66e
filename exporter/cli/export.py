"""The commands of a build host: export, verify. Knows only the command line."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from exporter.cli.plan import plan
from exporter.cli.triton import triton
from graphs.errors import MistralcError, UsageError
from runtime.cli import options
from runtime.system.progress import stage_for

_ENGINE = "Engines (--target rtx, tensorrt)"
_QUANTIZED = "Quantized precisions (int8wo, int4wo, int8, fp8)"


def register(app: typer.Typer) -> None:
    """Add this package's commands to `app`."""
    app.command()(export)
    app.command()(verify)
    app.command()(plan)
    app.command()(triton)


def export(
    *,
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Directory, .gguf file, or `smollm2`.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="BUNDLE",
                     help="Where to write; build/NAME-TARGET-PRECISION if left out."),
    ] = None,
    target: Annotated[
        str, typer.Option(help="What runs it: cpu, cuda (ONNX Runtime), rtx or tensorrt.")
    ] = "cpu",
    precision: Annotated[
        str | None,
        typer.Option(help="fp32 for cpu; fp16 or bf16 for the others, as the checkpoint is. Or "
                     "int8wo, int4wo (weights only), int8, fp8 (calibrated)."),
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="Make every layer see N tokens: text without end.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of a model without a window.")
    ] = None,
    chunk: Annotated[int | None, typer.Option(min=1, help="Most prompt tokens per step.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Most sequences at once.")] = 1,
    batch_invariant: Annotated[
        bool,
        typer.Option("--batch-invariant", help="A token is the same in bits alone and among "
                     "others, so that --speculate changes none. For cpu; a tenth to a quarter "
                     "slower."),
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="TABLE", help="What `mistralc calibrate` wrote for this checkpoint.",
                     rich_help_panel=_QUANTIZED),
    ] = None,
    block: Annotated[
        int | None,
        typer.Option(metavar="32|64|128", help="Input features that share a scale.",
                     rich_help_panel=_QUANTIZED),
    ] = None,
    symmetric: Annotated[
        bool,
        typer.Option("--symmetric", help="No zero points, as TensorRT wants it; smaller and worse.",
                     rich_help_panel=_QUANTIZED),
    ] = False,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="lm_head", help="Do not quantize the output layer.",
                     rich_help_panel=_QUANTIZED),
    ] = None,
    head_bits: Annotated[
        int,
        typer.Option(metavar="8|4", help="Bits of the output layer; 4 is faster and loses more.",
                     rich_help_panel=_QUANTIZED),
    ] = 8,
    head_block: Annotated[
        int | None,
        typer.Option(metavar="32|64|128", help="Input features of the output layer that share a "
                     "scale; 32 if left out, 64 is faster. For cpu.", rich_help_panel=_QUANTIZED),
    ] = None,
    max_ppl_increase: Annotated[
        float,
        typer.Option(metavar="RATIO", help="Most perplexity a bundle for cpu may lose; 0.1 is 10%.",
                     rich_help_panel=_QUANTIZED),
    ] = 0.1,
    text: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Measure that on it, not on Python's documentation.",
                     rich_help_panel=_QUANTIZED),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="sm89,…", help="Only these GPUs; all that TensorRT-RTX supports.",
                     rich_help_panel=_ENGINE),
    ] = None,
    two_profiles: Annotated[
        bool,
        typer.Option("--two-profiles", help="Tune single tokens and prompts apart.",
                     rich_help_panel=_ENGINE),
    ] = False,
    weight_streaming: Annotated[
        bool,
        typer.Option("--weight-streaming", help="Let a GPU smaller than the model run it.",
                     rich_help_panel=_ENGINE),
    ] = False,
    allow_faults: Annotated[
        bool,
        typer.Option("--allow-faults", help="Keep an engine that fails its audit.",
                     rich_help_panel=_ENGINE),
    ] = False,
    repository: Annotated[
        Path | None,
        typer.Option("--triton", metavar="REPOSITORY",
                     help="Then write a Triton model repository, as the command triton does."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is there.")] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:  # fmt: skip
    """Compile a checkpoint into a bundle, verify it, and publish it whole or not at all."""
    from exporter.bundle.triton_repository import check_repository, write_repository
    from exporter.checks.quality_gate import Gate
    from exporter.engine.request import EngineOptions
    from exporter.export import ExportOptions
    from exporter.export import export as run
    from exporter.quantization.policy import QuantizeOptions

    if repository is not None:
        check_repository(repository)
    engine = EngineOptions(
        gpus=tuple(name.strip() for name in gpu.split(",")) if gpu else (),
        two_profiles=two_profiles,
        weight_streaming=weight_streaming,
    )
    chosen = ExportOptions(
        target=target, precision=precision, window=window, context=context, chunk=chunk,
        max_batch=max_batch, force=force, engine=engine, allow_faults=allow_faults,
        quantize=QuantizeOptions(
            block=block, symmetric=symmetric, keep=tuple(keep or ()), head_bits=head_bits,
            head_block=head_block,
        ),
        calibration=calibration,
        gate=Gate(max_ppl_increase=max_ppl_increase, text=tuple(text or ())),
        batch_invariant=batch_invariant,
    )  # fmt: skip
    name = Path(checkpoint).resolve().name.removesuffix(".gguf") or "model"
    path = output or Path("build") / "-".join([name, target, chosen.precision_or_default])
    manifest = run(checkpoint, path, chosen, stage_for(quiet=quiet or as_json))
    if repository is not None:
        write_repository(path, repository)
    if as_json:
        print(json.dumps({"bundle": str(path), "manifest": json.loads(manifest.to_text())}))
        return
    size = sum(entry.size for entry in manifest.files.values())
    state = "verified" if manifest.verification else "to be verified where its GPU is"
    print(f"{path}: {size / 1e6:,.0f} MB, {manifest.target}, {manifest.precision}, {state}.")
    print("Next:")
    print(f'  {program()} generate {path} --chat "What is the capital of France?"')


def verify(
    *,
    bundle: options.BundlePath,
    against: Annotated[
        str | None,
        typer.Option(metavar="CHECKPOINT", help="Compare with it, not with the bundle's weights."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="TABLE", help="With --against, of a bundle that was made with one."),
    ] = None,
    short: Annotated[bool, typer.Option("--short", help="Only the quick cases of export.")] = False,
    require_signature: options.RequireSignature = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare a bundle with the PyTorch decoder, and record the result unless it is signed."""
    from exporter.checks import verify as verification
    from exporter.export import record
    from exporter.quantization.calibration_table import CalibrationTable
    from runtime.bundle.open import open_bundle
    from runtime.bundle.signature import read_signature
    from runtime.load import load_session

    stage = stage_for(quiet=quiet or as_json)
    with stage("Checking the bundle", None):
        opened = open_bundle(bundle, require_signature=require_signature)
    manifest = opened.manifest
    table = None if calibration is None else CalibrationTable.read(calibration)
    if table is not None and against is None:
        raise UsageError(
            "--calibration was given without --against: a bundle's own weights are quantized "
            "already. Add --against CHECKPOINT, or leave it out."
        )
    with stage("Loading both", None):
        if against is None:
            reference = verification.bundle_reference(bundle, manifest)
        else:
            reference = verification.checkpoint_reference(against, manifest, table)
        session = load_session(bundle, manifest)
    tokens = sum(case.tokens for case in verification.cases(manifest, short=short))
    with stage("Comparing", tokens) as advance:
        agreements = verification.verify(
            session, manifest, reference, short=short, progress=advance
        )
    source = "its own weights" if against is None else "the checkpoint"
    result = verification.to_json(agreements, source)
    print(json.dumps(result) if as_json else verification.to_markdown(result))
    if read_signature(bundle) is not None:
        typer.echo("The bundle is signed, so this is not recorded in it.", err=True)
    else:
        try:
            record(manifest, bundle, agreements, source)
        except OSError as error:
            raise MistralcError(
                f"The result could not be written into {bundle} ({error}). Make it writable, and "
                "verify again."
            ) from error
    verification.require(agreements)


def program() -> str:
    """How this command was called, so that what we tell people to type works as it stands."""
    called = Path(sys.argv[0])
    if shutil.which(called.name) == str(called.absolute()):
        return called.name
    return os.path.relpath(called)
