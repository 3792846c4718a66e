"""What exporting a full-size model to an engine takes, beside `cp` of the same files, in one run.

Not a test. `python -m benchmarks.export CHECKPOINT FOLDER --precision bf16 fp16` prints what it
ran on, the seconds and the peak of anonymous memory of each step, and the figures of the plan.
"""

import argparse
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.memory import PeakMemory
from exporter.export import ExportOptions, export
from runtime.measure.bench import machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path, help="on the file system to measure")
    parser.add_argument("--precision", nargs="+", default=["bf16"])
    parser.add_argument("--target", default="rtx")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    copy, bundle = arguments.folder / "copy", arguments.folder / "bundle"
    forget(arguments.checkpoint)
    began = perf_counter()
    subprocess.run(["cp", "-r", str(arguments.checkpoint), str(copy)], check=True)
    result: dict[str, Any] = {"machine": machine(), "cp_seconds": perf_counter() - began}
    shutil.rmtree(copy)
    for precision in arguments.precision:
        forget(arguments.checkpoint)
        result[precision] = measured(arguments.checkpoint, bundle, arguments.target, precision)
        shutil.rmtree(bundle)
    print(json.dumps(result, indent=2))


def forget(folder: Path) -> None:
    """Have the kernel drop its cache of the files, so that everyone reads them from the disk."""
    os.sync()  # a page that is not written yet cannot be dropped
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(checkpoint: Path, bundle: Path, target: str, precision: str) -> dict[str, Any]:
    """Export once; return the seconds and the peak memory of every step, and the engine's facts."""
    steps: dict[str, dict[str, float]] = {}

    @contextmanager
    def stage(title: str, total: int | None = None) -> Iterator[Any]:
        began = perf_counter()
        with PeakMemory() as memory:
            yield lambda _count: None
        steps[title] = {"seconds": perf_counter() - began, "peak_anonymous_gb": memory.peak / 1e9}

    options = ExportOptions(target=target, precision=precision, force=True)
    engine = dict(export(str(checkpoint), bundle, options, stage).engine or {})
    engine.pop("warnings", None)
    return {"steps": steps, "engine": engine}


if __name__ == "__main__":
    main()
