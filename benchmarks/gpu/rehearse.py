"""Rehearse a first session on a GPU over stub libraries, in a clean environment.

    python -m benchmarks.gpu.rehearse [--cache build/stubs] [--whole]

Packs a folder as `pack.py` does, with tiny models; makes a virtual environment that has only what
the host of a GPU has; and runs every step of `start.py` there, over the stubs of `stubs/`. Kernels
that do nothing give logits of zero, so every comparison must report a difference: that is checked,
and so are capture, the line of each step, and that nothing is missing. `--whole` packs the real
shapes and compresses as much as possible (4 minutes more), which checks the 62 MB.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu import pack
from benchmarks.gpu.first_session import CORRECTNESS, SPEED, Step
from benchmarks.gpu.shapes import MISTRAL_7B, large, layers, small
from benchmarks.gpu.stubs import libraries, provider
from graphs.errors import MistralcError
from graphs.spec import ModelSpec
from tests.support.make_checkpoint import tiny_spec

ROOT = Path(__file__).resolve().parents[2]
ON_THE_HOST = ("torch", "onnx", "numpy", "safetensors", "tokenizers", "typer", "jinja2",
               "cuda-bindings")  # fmt: skip
"""All that a host of a GPU is supposed to have, in the versions of constraints.txt."""
FAST = 0  # xz's preset for a rehearsal: 20 MB larger, and 2 minutes faster


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "stubs")
    parser.add_argument(
        "--python",
        type=Path,
        default=Path(sys.executable),
        help="an interpreter of the version that the host has",
    )
    parser.add_argument("--whole", action="store_true", help="pack what a GPU's host would get")
    given = parser.parse_args()  # fmt: skip
    cache: Path = given.cache.resolve()
    version = python_version(given.python)
    environment = clean_environment(cache, given.python, version)
    folder, work = cache / "packed", cache / "session"
    narrow = [*small(tiny(2)), *large(tiny(2))]
    shapes = [*small(), *large()] if given.whole else narrow
    size = pack.pack(folder, cache, pack.H100, version, shapes,
                     preset=pack.SMALLEST if given.whole else FAST)  # fmt: skip
    print(f"packed folder: {size / 1e6:.1f} MB", flush=True)
    if given.whole:  # a CPU has no use for a 7B: the steps run on tiny models either way
        files = pack.written_shapes(narrow, cache / "shapes")
        pack.write_archive(folder / "shapes.tar.xz", files, FAST)
    stubs = cache / "libraries"
    package = provider.unpacked(cache, version)
    libraries.build([package / provider.CUDA_LIBRARY, *cuda_users(environment)], stubs)
    shutil.rmtree(work, ignore_errors=True)
    faults = [
        *session("correctness", CORRECTNESS, folder, work, environment, stubs),
        *session("speed", SPEED, folder, work, environment, stubs),
    ]
    print("\n".join(faults) or "Every step ran, reported its line, and was captured.")
    return 1 if faults else 0


def tiny(count: int) -> ModelSpec:
    """Mistral-7B's heads and window, but few layers and narrow ones."""
    spec = tiny_spec(
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, hidden_size=256,
        intermediate_size=384, max_position_embeddings=MISTRAL_7B.max_position_embeddings,
    )  # fmt: skip
    return layers(spec, MISTRAL_7B.layer_windows[:count])


def session(
    phase: str, steps: tuple[Step, ...], folder: Path, work: Path, python: Path, stubs: Path
) -> Iterator[str]:
    """Run one phase as on the host of a GPU; prints its lines, and yields what is wrong."""
    done = subprocess.run(
        [python, folder / "start.py", phase, "--work", work, "--device", "cpu"],
        env=host_environment(stubs), cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(done.stdout, flush=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    names = ["unpack", *(step.name for step in steps)]
    if [line["step"] for line in lines] != names:
        yield f"{phase}: expected a line for each of {names}; {done.stderr[-2000:]}"
    yield from (fault for line in lines for fault in faults_of(line))


def faults_of(line: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a step's line, given that no kernel computed anything."""
    name, found = line["step"], line.get("result")
    if name in ("unpack", "machine"):
        if not line["ok"]:
            yield f"{name}: {line.get('error')}"
        return
    if found is None:
        yield f"{name}: no result; {line.get('error')}"
    elif name.startswith("correctness"):
        if found["passed"]:
            yield f"{name}: passed, although nothing was computed"
        if not found["captured"]:
            yield f"{name}: not captured"
        for rows, one in found["rows"].items():
            if set(one["cases"]) != {"chunks", "single steps", "mixed"}:
                yield f"{name}: with {rows} rows, only {sorted(one['cases'])} were compared"
    else:
        symbolic = name.endswith("symbolic")
        for one in found["by_batch"]:
            if one["captured"] == symbolic:
                yield f"{name}: captured is {one['captured']} with {one['batch']} rows"
            if not one["decode_s_at"] or one["ttft_s"] is None:
                yield f"{name}: nothing was measured with {one['batch']} rows"


def cuda_users(python: Path) -> Iterator[Path]:
    """Libraries of the environment that would find the stubs: those of a PyTorch with CUDA."""
    packages = next((python.parents[1] / "lib").glob("python*/site-packages"))
    if any((packages / "torch" / "lib").glob("libtorch_cuda*.so")):
        for folder in ("torch/lib", "nvidia", "cusparselt"):
            yield from (packages / folder).rglob("*.so*")


def host_environment(stubs: Path) -> dict[str, str]:
    """Environment variables of a host that sees the stubs and has no project around it."""
    kept = {name: value for name, value in os.environ.items()
            if name in ("PATH", "HOME", "LANG", "TMPDIR")}  # fmt: skip
    # A PyTorch with CUDA names the folder of its own libraries: what is loaded already comes first.
    loaded = [str(path) for path in sorted(stubs.glob("*.so.*"))]
    return {**kept, "LD_LIBRARY_PATH": str(stubs), "LD_PRELOAD": ":".join(loaded),
            "PYTHONPATH": str(libraries.SOURCES / "site")}  # fmt: skip


def clean_environment(cache: Path, python: Path, version: str) -> Path:
    """The interpreter of a virtual environment with ON_THE_HOST alone, made once."""
    folder = cache / f"host-{version}"
    inside = folder / "bin" / "python"
    if not (folder / "ready").exists():
        subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
        # torch first and alone, so that nothing asks for a build with CUDA inside.
        for names in (ON_THE_HOST[:1], ON_THE_HOST[1:]):
            subprocess.run(
                [inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
                 "--constraint", ROOT / "constraints.txt", *names],
                check=True,
            )  # fmt: skip
        (folder / "ready").touch()
    return inside


def python_version(python: Path) -> str:
    """Major and minor version, such as "3.12"; "" if the interpreter does not start."""
    program = "import sys; print('%d.%d' % sys.version_info[:2])"
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False)
    return done.stdout.strip()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MistralcError as error:
        sys.exit(f"rehearse: {error}")
