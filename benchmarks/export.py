"""What exporting takes, step by step, beside what `mistralc plan` says of it. Not a test.

    python -m benchmarks.export FOLDER --checkpoint smollm2 /path/to/mistral-7b [--write]

Exports each checkpoint in each of `--build` (cpu:fp32, …), every export in a process of its own
from files that the kernel has dropped from its cache, and measures seconds, the peak of anonymous
memory of this process and its children, the peak of disk space, and the bundle's bytes. A build
that this host cannot hold is refused, and the refusal is kept. Bundles are removed. Results stay in
FOLDER/results.json, so a run can go on where it stopped (`--again` measures anew). With --write
the table in docs/benchmarks.md is replaced.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from threading import Event, Thread
from time import perf_counter
from typing import Any

from benchmarks.memory import PeakMemory
from exporter.checkpoint.locate import locate
from exporter.decide import decide, read_facts
from exporter.estimate.host import HostNeeds, host_needs
from exporter.options import ExportOptions
from graphs.errors import MistralcError
from graphs.targets import TARGETS
from runtime.measure.bench import machine
from tests.support.documents import DOCS, replace_between

MARKS = "<!-- measured by benchmarks/export.py -->", "<!-- end of the exports -->"
BUILDS = ("cpu:fp32", "cpu:int8wo", "cpu:int4wo", "rtx:bf16", "rtx:int4wo")
INTERVAL = 0.25  # seconds between two looks at the disk

Result = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="on the file system to measure")
    parser.add_argument("--checkpoint", nargs="+", default=["smollm2"])
    parser.add_argument("--build", nargs="+", default=BUILDS, metavar="TARGET:PRECISION")
    parser.add_argument("--again", action="store_true", help="measure what has a result, too")
    parser.add_argument("--write", action="store_true", help="replace the table in docs/")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measured(arguments)))
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    file = arguments.folder / "results.json"
    results: dict[str, Result] = json.loads(file.read_text()) if file.exists() else {}
    for checkpoint in arguments.checkpoint:
        for build in arguments.build:
            name = f"{Path(checkpoint).name} {build}"
            if arguments.again or name not in results:
                results[name] = in_process(arguments.folder, checkpoint, build)
                file.write_text(json.dumps(results, indent=2))
            print(name, json.dumps(results[name]), flush=True)
    table = to_markdown(results)
    print(table)
    if arguments.write:
        replace_between(DOCS / "benchmarks.md", *MARKS, table)


def in_process(folder: Path, checkpoint: str, build: str) -> Result:
    """Export once in a process of its own, and remove the bundle."""
    bundle = folder / "bundle"
    bundle.mkdir(exist_ok=True)
    try:
        command = [sys.executable, "-m", "benchmarks.export", str(bundle), "--worker"]
        command += ["--checkpoint", checkpoint, "--build", build]
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found: Result = json.loads(ended.stdout.splitlines()[-1])
        return found
    finally:
        shutil.rmtree(bundle)


def measured(arguments: argparse.Namespace) -> Result:
    """Export once; return what was estimated and what was measured."""
    from exporter.export import export

    (source,), (build,) = arguments.checkpoint, arguments.build
    target, precision = build.split(":")
    options = ExportOptions(target=target, precision=precision)
    spec, facts = read_facts(source)
    needed = host_needs(decide(spec, TARGETS[target], options, facts), facts)
    common = {"machine": machine(), "load": os.getloadavg()[0], "estimate": to_json(needed)}
    forget(locate(source).path)
    steps: dict[str, dict[str, float]] = {}

    @contextmanager
    def stage(title: str, total: int | None = None) -> Iterator[Any]:
        before, began = cpu_seconds(), perf_counter()
        with PeakMemory() as memory:
            yield lambda _count: None
        steps[title] = {
            "seconds": perf_counter() - began,
            "cpu_seconds": cpu_seconds() - before,
            "memory_bytes": memory.peak,
            "child_memory_bytes": memory.children,
        }
        print(title, json.dumps(steps[title]), file=sys.stderr, flush=True)

    began = perf_counter()
    try:
        with PeakMemory() as memory, PeakDisk(arguments.folder) as disk:
            manifest = export(source, arguments.folder / "bundle", options, stage)
    except MistralcError as error:
        return {**common, "refused": str(error)}
    return {
        **common,
        "steps": steps,
        "seconds": perf_counter() - began,
        "memory_bytes": max(memory.peak, memory.children),
        "disk_bytes": disk.peak,
        "bundle_bytes": manifest.file_bytes,
        "plan": (manifest.engine or {}).get("plan_bytes"),
    }


def to_json(needed: HostNeeds) -> dict[str, Any]:
    """The estimate as plain data, with its totals."""
    return {
        **asdict(needed),
        "memory_bytes": needed.memory_bytes,
        "seconds": sum(step.seconds for step in needed.steps),
    }


def cpu_seconds() -> float:
    """Processor time of this process and of the children that have ended."""
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def forget(path: Path) -> None:
    """Have the kernel drop its cache of the files, so that everyone reads them from the disk."""
    os.sync()  # a page that is not written yet cannot be dropped
    for file in path.iterdir() if path.is_dir() else [path]:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class PeakDisk:
    """The most bytes that files below a folder took on the disk while the block ran: `peak`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.peak = folder, 0
        self._done = Event()
        self._thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakDisk":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            self.peak = max(self.peak, disk_bytes(self.folder))


def disk_bytes(folder: Path) -> int:
    """Bytes that the files below `folder` take now; files may come and go meanwhile."""
    found = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                found += Path(where, name).stat().st_blocks * 512
    return found


def to_markdown(results: dict[str, Result]) -> str:
    """A table of totals, one of steps, and what they were measured on."""
    totals = [
        "| export | memory | disk | bundle | time |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    steps = [
        "| step | memory | of a child process | time |",
        "| --- | ---: | ---: | ---: |",
    ]
    refused = []
    for name, one in results.items():
        said = one["estimate"]
        if "refused" in one:
            totals.append(f"| {name} | {said['memory_bytes'] / 1e9:.2f} GB, refused | | | |")
            refused.append(f'{name}: "{one["refused"]}"')
            continue
        sizes = ("memory_bytes", "disk_bytes", "bundle_bytes")
        cells = [beside(said[key], one[key]) for key in sizes]
        time = beside(said["seconds"], one["seconds"], 1, "s")
        totals.append(f"| {' | '.join([name, *cells, time])} |")
        expected = {step["name"]: step for step in said["steps"]}
        steps += [
            f"| {name}: {title[0].lower()}{title[1:]} {_step(expected.get(title, {}), step)}"
            for title, step in one["steps"].items()
        ]
    loads = sorted(one["load"] for one in results.values())
    on = next(iter(results.values()))["machine"]
    about = ", ".join(f"{key} {value}" for key, value in on.items())
    return "\n\n".join([
        f"Estimated / measured, and how far off. Run on: {about}. Load average when an export "
        f"began: {loads[0]:.1f} to {loads[-1]:.1f}.",
        "\n".join(totals), *refused, "By step:", "\n".join(steps),
    ])  # fmt: skip


def _step(said: dict[str, Any], found: dict[str, float]) -> str:
    """Memory of the process and of its children, and time, as cells of a row."""
    memory, in_child = said.get("memory_bytes"), said.get("in_child", False)
    child = found["child_memory_bytes"]
    cells = [
        beside(None if in_child else memory, found["memory_bytes"]),
        beside(memory if in_child else None, child) if child else "",
        beside(said.get("seconds"), found["seconds"], 1, "s"),
    ]
    return f"| {' | '.join(cells)} |"


def beside(said: float | None, found: float, scale: float = 1e9, unit: str = "GB") -> str:
    """An estimate beside what was measured."""
    digits = 2 if unit == "GB" else 0
    if said is None:
        return f"{found / scale:.{digits}f} {unit}"
    off = f" ({said / found - 1:+.0%})" if found else ""
    return f"{said / scale:.{digits}f} / {found / scale:.{digits}f} {unit}{off}"


if __name__ == "__main__":
    main()
