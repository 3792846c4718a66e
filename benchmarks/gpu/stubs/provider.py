"""Fetch onnxruntime-gpu and unpack it into a folder of its own, never into the environment.

It shares its import name with the CPU package, so the two exclude each other in one environment.
"""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = "onnxruntime-gpu"
CUDA_LIBRARY = "onnxruntime/capi/libonnxruntime_providers_cuda.so"


def pinned_version() -> str:
    """The version of ONNX Runtime in constraints.txt: both packages are released together."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith("onnxruntime=="))


def wheel(cache: Path, python: str) -> Path:
    """The wheel of the pinned version for a Python such as "3.12", downloaded once into `cache`.

    Raises CalledProcessError, after pip's own message, if no index has it.
    """
    tag = "cp" + python.replace(".", "")
    pattern = f"{PACKAGE.replace('-', '_')}-{pinned_version()}-{tag}-*.whl"
    if not any(cache.glob(pattern)):
        print(f"downloading {PACKAGE} {pinned_version()}, 255 MB", file=sys.stderr, flush=True)
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
             "--only-binary=:all:", "--python-version", python, "--dest", cache,
             f"{PACKAGE}=={pinned_version()}"],
            check=True,
        )  # fmt: skip
    return next(cache.glob(pattern))


def unpacked(cache: Path, python: str) -> Path:
    """A folder in `cache` to put on PYTHONPATH that holds the package, unpacked once."""
    source = wheel(cache, python)
    folder = cache / source.stem
    if not (folder / CUDA_LIBRARY).exists():
        part = folder.with_suffix(".part")
        with zipfile.ZipFile(source) as archive:
            archive.extractall(part)
        part.rename(folder)
    return folder
