"""Write a Triton Inference Server model repository for a bundle. Knows nothing about models.

REPOSITORY/NAME/config.pbtxt
REPOSITORY/NAME/1/model.py        runtime/serve/triton_backend.py, out of the bundle's run.pyz
REPOSITORY/NAME/1/bundle/         a copy: Triton may fetch the repository from anywhere
"""

import json
import shutil
import zipfile
from pathlib import Path

from exporter.bundle import triton_model
from exporter.bundle.staging import staged
from graphs.errors import MistralcError, UsageError
from graphs.manifest import FILE_NAME, SIGNATURE, Manifest
from runtime.bundle.open import open_bundle

ROWS = 8  # requests that run at the same time on a CPU; an engine has a fixed number of rows
PARAMETERS = {"max_waiting": 256, "max_tokens": 4096}  # the defaults of `serve`

INPUTS = {  # type and dimension; all are optional, but one of the first two is needed
    "prompt": ("STRING", 1),
    "messages": ("STRING", 1),  # a chat, as JSON
    "max_tokens": ("INT32", 1),
    "stop": ("STRING", -1),
    "temperature": ("FP64", 1),
    "top_k": ("INT32", 1),
    "top_p": ("FP64", 1),
    "min_p": ("FP64", 1),
    "repetition_penalty": ("FP64", 1),
    "presence_penalty": ("FP64", 1),
    "frequency_penalty": ("FP64", 1),
    "seed": ("INT64", 1),
}
OUTPUTS = ("text", "finish_reason")
RUNTIME = "runtime/serve/triton_backend.py"  # in run.pyz


def check_repository(destination: Path) -> None:
    """Raise UsageError unless `destination` is missing or an empty directory."""
    if destination.is_dir() and not destination.is_symlink() and not any(destination.iterdir()):
        return
    if destination.exists() or destination.is_symlink():
        raise UsageError(
            f"{destination} exists and is not an empty directory; expected a new one, because "
            "nothing is replaced. Choose another name, or remove it."
        )


def write_repository(
    bundle: Path, destination: Path, require_signature: Path | None = None
) -> Path:
    """Write the repository, whole or not at all; returns the model's directory in it.

    Raises MistralcError if the bundle is damaged, or has a runtime without Triton's part.
    """
    check_repository(destination)
    opened = open_bundle(bundle, require_signature=require_signature)
    manifest, name = opened.manifest, bundle.resolve().name
    if not _has_runtime(bundle / "run.pyz"):
        raise MistralcError(
            f"{bundle} was exported by a mistralc without support for Triton: its run.pyz lacks "
            f"{RUNTIME}. Export the checkpoint again."
        )
    with staged(destination) as staging:
        version = staging / name / "1"
        version.mkdir(parents=True)
        (version.parent / "config.pbtxt").write_text(config(name, manifest), encoding="utf-8")
        shutil.copyfile(str(triton_model.__file__), version / "model.py")
        for file in (*manifest.files, FILE_NAME, SIGNATURE):
            if file != SIGNATURE or (bundle / file).exists():
                copy = version / "bundle" / file
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(bundle / file, copy)
    return destination / name


def config(name: str, manifest: Manifest) -> str:
    """Return `config.pbtxt`: a ModelConfig (Triton's model_config.proto) in text format."""
    on_cpu = not manifest.known_target.on_gpu
    parameters = {"rows": ROWS if on_cpu else manifest.ring.max_batch, **PARAMETERS}
    lines = [
        f"name: {json.dumps(name)}",
        'backend: "python"',
        "max_batch_size: 0",
        "model_transaction_policy { decoupled: true }",
        *(
            f'input {{ name: "{key}" data_type: TYPE_{kind} dims: [ {size} ] optional: true }}'
            for key, (kind, size) in INPUTS.items()
        ),
        *(f'output {{ name: "{key}" data_type: TYPE_STRING dims: [ 1 ] }}' for key in OUTPUTS),
        # One instance runs all rows; another one would load the weights a second time.
        "instance_group { count: 1 kind: KIND_CPU }" if on_cpu
        else "instance_group { count: 1 kind: KIND_GPU gpus: [ 0 ] }",
        *(
            f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'
            for key, value in parameters.items()
        ),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _has_runtime(archive: Path) -> bool:
    try:
        with zipfile.ZipFile(archive) as file:
            return RUNTIME in file.namelist()
    except (OSError, zipfile.BadZipFile):
        return False
