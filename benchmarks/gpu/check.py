"""Does it run on this GPU, is it right, and how fast? By hand, on a host with a GPU:

    python benchmarks/gpu/check.py [--layers N] [--target rtx|tensorrt|cuda ...] [--out DIR]

Makes a random-weight checkpoint of Mistral-7B's shapes, exports it for each target that this host
can build, compares it with the PyTorch decoder, and measures it. Every step is a process of its own
with a time limit, so that a crash or a hang costs one line of the table. Prints JSON and a Markdown
table. Knows nothing about what a good figure is.
"""

import argparse
import json
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also where run as a script

from exporter.estimate import plan
from graphs.errors import MistralcError
from graphs.gpu_catalogue import GPUS, Gpu
from graphs.manifest import Manifest, read_manifest
from runtime.decoding.ring import ContextFullError
from runtime.load import load_session, make_ring
from runtime.system import host

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("rtx", "tensorrt", "cuda")
POSITIONS = (4096, 8192, 16_384, 32_768, 65_536)
STEPS = 64  # at each position; medians are quoted
PROMPT = 4096  # tokens
COPY_BYTES, COPIES = 1 << 29, 20
LIBRARIES = ("tensorrt-rtx-cu13", "tensorrt", "onnxruntime", "onnxruntime-gpu", "cuda-bindings",
             "torch")  # fmt: skip
COLUMNS = ("target", "precision", "batch", "verified", "tokens_per_s", "of_datasheet", "of_copy",
           *(f"ms_at_{p // 1024}k" for p in POSITIONS), "ttft_s", "gpu_gb")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Check and measure mistralc on this GPU.")
    parser.add_argument("--layers", type=int, help="instead of Mistral-7B's 32")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--precision", nargs="+", default=["fp16", "bf16"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check")
    parser.add_argument("--limit", type=int, default=1800, help="seconds that a step may take")
    parser.add_argument("--measure", type=Path, metavar="BUNDLE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        if args.measure is not None:
            print(json.dumps(measure(args.measure, args.batch)))
            return 0
        return check(args)
    except MistralcError as error:
        print(f"check: {error}", file=sys.stderr)
        return 1


def check(args: argparse.Namespace) -> int:
    """Run everything; 0 only if every target that could be built was right."""
    found = host.cuda()
    if found.problem is not None:
        raise MistralcError(
            f"This script measures a GPU, and here {found.problem}. Run it on a host where "
            "nvidia-smi lists one; nothing was written."
        )
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = make_checkpoint(args)
    report = {"machine": machine(found), "layers": args.layers or 32, "runs": []}
    for target in args.target:
        for precision in args.precision:
            say(f"{target} {precision}")
            report["runs"].append(one(target, precision, checkpoint, args))
            # after each, so that an interrupted run leaves what it found
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


def one(target: str, precision: str, checkpoint: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Export, verify and measure one bundle. What fails is told under `error` and ends it."""
    from tests.support.device_session import missing

    run: dict[str, Any] = {"target": target, "precision": precision}
    lacking = missing(target)
    if lacking is not None:
        return run | {"skipped": lacking}
    bundle = args.out / f"{target}-{precision}"
    mistralc = [sys.executable, ROOT / "mistralc.py"]
    export = [*mistralc, "export", checkpoint, "-o", bundle, "--target", target, "--precision",
              precision, "--max-batch", str(max(args.batch)), "--force", "--json"]  # fmt: skip
    verify = [*mistralc, "verify", bundle, "--against", checkpoint, "--short", "--json"]
    bench = [sys.executable, __file__, "--measure", bundle, "--batch", *map(str, args.batch)]
    with MemoryPeak() as memory:
        for name, command in (("export", export), ("verification", verify), ("bench", bench)):
            began = perf_counter()
            memory.peak = 0
            try:
                # a verification that finds a difference prints it before it fails
                run[name] = step(command, args.limit, lambda found: run.update({name: found}))  # noqa: B023
            except MistralcError as error:
                run.setdefault("error", f"{name}: {error}")
                if name == "export":
                    break
            run[f"{name}_s"] = round(perf_counter() - began, 1)
            run[f"{name}_gpu_bytes"] = memory.peak or None
    run.pop("export", None)  # the manifest is in the bundle
    return run


def step(
    command: Iterable[object], limit: int, keep: Callable[[Any], None] = lambda found: None
) -> Any:
    """Run a process; returns the JSON in the last line of its output, None if that is none.

    Raises MistralcError when it fails, crashes or takes longer than `limit` seconds.
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
        words = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise MistralcError(f"{how}: {words[0][:600]}")
    return found


def measure(bundle: Path, batches: list[int]) -> dict[str, Any]:
    """Everything about one bundle, in this process: latency by position, prompts, memory."""
    manifest = read_manifest(bundle)
    device = host.cuda().devices[0]
    table_entry = find_gpu(device)
    copy = copy_bandwidth()
    return {
        "copy_bytes_per_s": copy,
        "datasheet_bytes_per_s": table_entry and table_entry.bandwidth_bytes_per_s,
        "by_batch": [measure_batch(bundle, manifest, batch, copy, table_entry)
                     for batch in batches],
    }  # fmt: skip


def measure_batch(
    bundle: Path, manifest: Manifest, batch: int, copy: float, gpu: Gpu | None
) -> dict[str, Any]:
    began = perf_counter()
    session: Any = load_session(bundle, manifest, batch=batch)
    loaded = perf_counter() - began
    try:
        ttft = prompt_seconds(session, manifest, batch)
        latency = {p: s for p in POSITIONS if (s := step_seconds(session, manifest, batch, p))}
    finally:
        session.close()
    ring = replace(manifest.ring, max_batch=batch)
    read = plan(manifest.model, ring, manifest.target, manifest.precision).read_bytes_per_step
    first, last = (latency[end(latency)] for end in (min, max)) if latency else (None, None)
    return {
        "batch": batch,
        "captured": session.captured,
        "load_s": loaded,
        "prompt_tokens": PROMPT,
        "ttft_s": ttft,
        "decode_s_at": latency,
        "flatness": last / first if first and last else None,
        "tokens_per_s": batch / first if first else None,
        "read_bytes_per_step": read,
        "of_copy": read / first / copy if first else None,
        "of_datasheet": read / first / gpu.bandwidth_bytes_per_s if first and gpu else None,
    }


def prompt_seconds(session: Any, manifest: Manifest, batch: int) -> float | None:
    """Seconds for PROMPT tokens from an empty ring, median of 5 after one; None if too many."""
    seconds = []
    for _ in range(6):
        ring = make_ring(manifest)
        try:
            pieces = list(ring.pieces(PROMPT))
        except ContextFullError:
            return None
        began, here = perf_counter(), 0
        for count in pieces:
            ids = np.full((batch, count), here % manifest.model.vocab_size)
            positions = np.tile(np.arange(here, here + count), (batch, 1))
            session.step(ids, positions, np.full((batch, 1), count - 1))
            here += count
        seconds.append(perf_counter() - began)
    return median(seconds[1:])


def step_seconds(session: Any, manifest: Manifest, batch: int, position: int) -> float | None:
    """Seconds of a one-token step around `position`, median; None where the text has ended.

    The ring is not filled up to there: what a step reads and computes does not depend on it.
    """
    if not manifest.model.slides and position > manifest.ring.context:
        return None
    one, seconds = np.zeros((batch, 1), np.int64), []
    for here in range(position - STEPS, position):
        began = perf_counter()
        session.step(one, one + here, one)
        seconds.append(perf_counter() - began)
    return median(seconds)


def copy_bandwidth() -> float:
    """Bytes read and written per second by copies within the GPU's memory."""
    from runtime.backends.cuda_device import Gpu as Open

    device = Open("cuda")
    try:
        source, to = (device.allocate(COPY_BYTES, "a measurement") for _ in range(2))
        kind = device._cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice

        def run() -> float:
            device.wait()
            began = perf_counter()
            for _ in range(COPIES):
                device.call("cudaMemcpyAsync", to, source, COPY_BYTES, kind, device._stream)
            device.wait()
            return perf_counter() - began

        return 2 * COPIES * COPY_BYTES / min(run() for _ in range(5))
    finally:
        device.close()


def find_gpu(device: host.Device) -> Gpu | None:
    """The table's entry of this device: same capability, memory within 15 %, named in its name."""
    name = "".join(c for c in device.name.lower() if c.isalnum())

    def fits(item: tuple[str, Gpu]) -> bool:
        key, gpu = item
        return (
            gpu.compute_capability == device.compute_capability
            and abs(device.memory_bytes / gpu.memory_bytes - 1) < 0.15
            and key.partition("-")[0] in name
            and ("pcie" in key) == ("pcie" in name)
        )

    return next((gpu for _, gpu in filter(fits, GPUS.items())), None)


def machine(found: host.Cuda) -> dict[str, Any]:
    """What this ran on."""
    device, versions = found.devices[0], {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "gpu": device.name,
        "compute_capability": device.compute_capability,
        "memory_bytes": device.memory_bytes,
        "driver": found.driver,
        "cuda": ".".join(map(str, found.version or ())),
        "python": platform.python_version(),
        "versions": versions,
    }


class MemoryPeak:
    """The most memory that was in use on the first GPU, by whomever, since `peak` was set to 0."""

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "MemoryPeak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        command = ["nvidia-smi", "--id=0", "--query-gpu=memory.used",
                   "--format=csv,noheader,nounits"]  # fmt: skip
        while not self._stop.wait(0.2):
            with suppress(OSError, ValueError, subprocess.SubprocessError):
                said = subprocess.run(
                    command, capture_output=True, text=True, timeout=10, check=True
                ).stdout
                self.peak = max(self.peak, int(said) << 20)


def table(report: dict[str, Any]) -> str:
    """The report as Markdown: the machine, a row per batch, and what did not run."""
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
    """One line of the table, in the order of COLUMNS; a dash for what was not measured."""
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
        {True: "yes", False: "NO", None: "–"}[verified],
        *("–" if value is None else form.format(value * scale) for value, form, scale in numbers),
    ]


def say(text: str) -> None:
    """Tell a person what is going on; the results alone go to standard output."""
    print(f"check: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
