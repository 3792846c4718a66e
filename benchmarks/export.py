"""Measure the time and memory of exporting a full-size model to an engine, next to `cp`.

    python -m benchmarks.export CHECKPOINT FOLDER --precision bf16 fp16

Prints JSON: the machine, the seconds of `cp` of the checkpoint, and for each precision the seconds
and the peak anonymous memory of every step, with the facts about the plan.
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
from exporter.export import export
from exporter.options import ExportOptions
from runtime.measure.bench import machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path, help="folder on the file system to measure")
    parser.add_argument("--precision", nargs="+", default=["bf16"])
    parser.add_argument("--target", default="rtx")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    copy, bundle = arguments.folder / "copy", arguments.folder / "bundle"
    drop_cache(arguments.checkpoint)
    began = perf_counter()
    subprocess.run(["cp", "-r", str(arguments.checkpoint), str(copy)], check=True)
    result: dict[str, Any] = {"machine": machine(), "cp_seconds": perf_counter() - began}
    shutil.rmtree(copy)
    for precision in arguments.precision:
        drop_cache(arguments.checkpoint)
        result[precision] = measure(arguments.checkpoint, bundle, arguments.target, precision)
        shutil.rmtree(bundle)
    print(json.dumps(result, indent=2))


def drop_cache(folder: Path) -> None:
    """Drop the page cache of the files, so that the next read comes from the disk."""
    os.sync()  # dirty pages cannot be dropped
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(checkpoint: Path, bundle: Path, target: str, precision: str) -> dict[str, Any]:
    """Export once; return seconds and peak memory of every step, and facts about the engine."""
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
