"""The command triton. Knows only the command line."""

import json
from pathlib import Path
from typing import Annotated

import typer

from runtime.cli import options
from runtime.system.progress import stage_for


def triton(
    *,
    bundle: options.BundlePath,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="REPOSITORY",
                     help="Where to write; existing files are never replaced."),
    ],
    require_signature: options.RequireSignature = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:  # fmt: skip
    """Write a Triton Inference Server model repository with a copy of the bundle in it."""
    from exporter.bundle.triton_repository import write_repository

    with stage_for(quiet=quiet or as_json)("Copying the bundle", None):
        model = write_repository(bundle, output, require_signature)
    if as_json:
        print(json.dumps({"repository": str(output), "model": model.name}))
    else:
        path = output.absolute()  # Triton needs an absolute path
        print(f"{output}: the model {model.name}, for tritonserver --model-repository {path}.")
