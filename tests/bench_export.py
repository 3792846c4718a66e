"""What exporting a full-size model to an engine takes, beside `cp` of the same files, in one run.

Not a test. `python -m tests.bench_export CHECKPOINT FOLDER --precision bf16` prints what it ran on,
the seconds and the peak of anonymous memory of each step, and the figures of the plan.
"""

import argparse
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

from exporter.export import ExportOptions, export
from exporter.memory import PeakMemory
from runtime.bench import machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path, help="on the file system to measure")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--target", default="rtx")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    steps: dict[str, dict[str, float]] = {}

    @contextmanager
    def stage(title: str, total: int | None = None) -> Iterator[Any]:
        began = perf_counter()
        with PeakMemory() as memory:
            yield lambda _count: None
        steps[title] = {"seconds": perf_counter() - began, "peak_anonymous_gb": memory.peak / 1e9}

    copy = arguments.folder / "copy"
    began = perf_counter()
    subprocess.run(["cp", "-r", str(arguments.checkpoint), str(copy)], check=True)
    copied = perf_counter() - began
    shutil.rmtree(copy)
    options = ExportOptions(target=arguments.target, precision=arguments.precision, force=True)
    manifest = export(str(arguments.checkpoint), arguments.folder / "bundle", options, stage)
    engine = dict(manifest.engine or {})
    engine.pop("warnings", None)
    result = {"machine": machine(), "precision": arguments.precision, "cp_seconds": copied,
              "steps": steps, "engine": engine}  # fmt: skip
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
