"""Check and measure mistralc on a GPU. Run it by hand on a host that has one:

    python benchmarks/gpu/check.py [--layers N] [--target rtx|tensorrt|cuda ...] [--out DIR]

The script writes a random-weight checkpoint of Mistral-7B's shapes, exports it for each target that
this host supports, verifies it against the PyTorch decoder, and measures it. Every step is a
process of its own with a time limit, so a crash or a hang costs one row of the table. It prints the
machine, the versions and all figures as JSON, and a Markdown table, and writes both to DIR.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # to run as a script

from benchmarks.gpu.machine import machine
from benchmarks.gpu.measure import POSITIONS, MemoryPeak, measure
from graphs.errors import MistralcError
from graphs.manifest import read_manifest
from graphs.targets import TARGETS
from runtime.system import host

ROOT = Path(__file__).resolve().parents[2]
GPU_TARGETS = tuple(name for name, target in TARGETS.items() if target.on_gpu)
COLUMNS = ("target", "precision", "batch", "verified", "captured", "tokens_per_s", "of_datasheet",
           "of_copy", *(f"ms_at_{p // 1024}k" for p in POSITIONS), "ttft_s", "gpu_gb")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Check and measure mistralc on this GPU.")
    parser.add_argument("--layers", type=int, help="number of layers (default: Mistral-7B's 32)")
    parser.add_argument("--target", nargs="+", choices=GPU_TARGETS, default=list(GPU_TARGETS))
    parser.add_argument(
        "--window",
        type=int,
        help="window of every layer (default: 4096); a small one is verified far beyond it",
    )
    parser.add_argument("--precision", nargs="+", default=["fp16", "bf16"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check")
    parser.add_argument("--limit", type=int, default=1800, help="time limit of a step in seconds")
    parser.add_argument("--measure", type=Path, metavar="BUNDLE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        if args.measure is not None:
            build = read_manifest(args.measure).build
            print(json.dumps(measure(args.measure, build, args.batch)))
            return 0
        return check(args)
    except MistralcError as error:
        print(f"check: {error}", file=sys.stderr)
        return 1


def check(args: argparse.Namespace) -> int:
    """Run all steps; return 0 only if at least one target ran and none failed."""
    found = host.cuda()
    if found.problem is not None:
        raise MistralcError(
            f"This script measures a GPU, and here {found.problem}. Run it on a host where "
            "nvidia-smi lists one. Nothing was written."
        )
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = make_checkpoint(args)
    report: dict[str, Any] = {"machine": machine(found), "layers": args.layers or 32, "runs": []}
    for target in args.target:
        for precision in args.precision:
            say(f"{target} {precision}")
            report["runs"].append(run_target(target, precision, checkpoint, args))
            # Saved after each run, so that an interrupted script keeps its results.
            (args.out / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    text = table(report)
    (args.out / "results.md").write_text(text)
    print(json.dumps(report))
    print(text)
    ran = [run for run in report["runs"] if "skipped" not in run]
    return 0 if ran and all("error" not in run for run in ran) else 1


def make_checkpoint(args: argparse.Namespace) -> Path:
    path: Path = args.out / f"checkpoint-{args.layers or 32}"
    if not (path / "config.json").exists():
        command = [sys.executable, ROOT / "tests" / "support" / "make_checkpoint.py", path,
                   "--preset", "mistral-7b-v0.1", "--dtype", "bf16"]  # fmt: skip
        if args.layers:
            command += ["--layers", str(args.layers)]
        say("making the checkpoint")
        step(command, args.limit)
    return path


def run_target(
    target: str, precision: str, checkpoint: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """Export, verify and measure one bundle; a failed step is recorded under `error`."""
    from tests.support.device_session import missing

    run: dict[str, Any] = {"target": target, "precision": precision}
    lacking = missing(target)
    if lacking is not None:
        return run | {"skipped": lacking}
    bundle = args.out / f"{target}-{precision}"
    mistralc = [sys.executable, ROOT / "mistralc.py"]
    export = [*mistralc, "export", checkpoint, "-o", bundle, "--target", target, "--precision",
              precision, "--max-batch", str(max(args.batch)), "--force", "--json"]  # fmt: skip
    verify = [*mistralc, "verify", bundle, "--against", checkpoint, "--device", "cuda", "--json"]
    if args.window:
        export += ["--window", str(args.window)]
    else:
        verify += ["--short"]  # the reference's scores of 8,195 tokens have 8.6 GB a layer
    bench = [sys.executable, __file__, "--measure", bundle, "--batch", *map(str, args.batch)]
    with MemoryPeak() as memory:
        for name, command in (("export", export), ("verification", verify), ("bench", bench)):
            began = perf_counter()
            memory.peak = 0
            try:
                # A failing verification prints its result first, which `keep` saves.
                run[name] = step(command, args.limit, lambda found: run.update({name: found}))  # noqa: B023
            except MistralcError as error:
                run.setdefault("error", f"{name}: {error}")
                if name == "export":
                    break
            run[f"{name}_s"] = round(perf_counter() - began, 1)
            # At once, so that a session that is cut off keeps what it found.
            print(json.dumps({"step": name, "target": target, "precision": precision,
                              "s": run[f"{name}_s"], "result": run.get(name),
                              "error": run.get("error")}), flush=True)  # fmt: skip
            run[f"{name}_gpu_bytes"] = memory.peak or None
    run.pop("export", None)  # the bundle has the manifest
    return run


def step(
    command: Iterable[object], limit: int, keep: Callable[[Any], None] = lambda found: None
) -> Any:
    """Run a process; return the JSON in the last line of its output, or None if it is not JSON.

    `keep` gets that JSON even if the process then fails. Raises MistralcError if the process fails,
    crashes or takes longer than `limit` seconds.
    """
    try:
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, timeout=limit,
            cwd=ROOT, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise MistralcError(f"stopped after {limit} s; give more with --limit") from error
    found = None
    with suppress(ValueError, IndexError):
        found = json.loads(done.stdout.strip().splitlines()[-1])
        keep(found)
    if done.returncode != 0:
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit {done.returncode}"
        words = done.stderr.strip().splitlines()[-1:] or ["no error output"]
        raise MistralcError(f"{how}: {words[0][:600]}")
    return found


def table(report: dict[str, Any]) -> str:
    """The report as Markdown: the machine, one row per batch size, skipped and failed runs."""
    facts = report["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    lines = [
        f"{facts['gpu']}, compute capability {facts['compute_capability']}, driver "
        f"{facts['driver']}, CUDA {facts['cuda']}, Python {facts['python']}; {versions}. "
        f"Mistral-7B's shapes, {report['layers']} layers, random weights.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + " --- |" * len(COLUMNS),
    ]
    lines += [
        "| " + " | ".join(row(run, found)) + " |"
        for run in report["runs"]
        for found in (run.get("bench") or {}).get("by_batch", ())
    ]
    notes = [
        f"- {run['target']} {run['precision']} {name}: {run[name]}"
        for run in report["runs"]
        for name in ("skipped", "error")
        if name in run
    ]
    return "\n".join([*lines, "", *notes, ""])


def row(run: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """One row of the table in the order of COLUMNS; a dash for a figure that is missing."""
    latency = {int(position): s for position, s in found["decode_s_at"].items()}
    verified = (run.get("verification") or {}).get("passed")
    memory = run.get("bench_gpu_bytes")
    numbers = (
        (found["tokens_per_s"], "{:.1f}", 1),
        (found["of_datasheet"], "{:.0%}", 1),
        (found["of_copy"], "{:.0%}", 1),
        *((latency.get(position), "{:.2f}", 1e3) for position in POSITIONS),
        (found["ttft_s"], "{:.3f}", 1),
        (memory, "{:.2f}", 1e-9),
    )
    return [
        run["target"],
        run["precision"],
        str(found["batch"]),
        _yes_or_no(verified),
        _yes_or_no(found.get("captured")),
        *("–" if value is None else form.format(value * scale) for value, form, scale in numbers),
    ]


def _yes_or_no(fact: bool | None) -> str:
    return {True: "yes", False: "NO", None: "–"}[fact]


def say(text: str) -> None:
    """Print progress to standard error; standard output is for results."""
    print(f"check: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
