"""What to do with the first minutes on a GPU: a list of steps, each a process with a time limit.

    python -m benchmarks.gpu.first_session correctness|speed --shapes DIR --weights DIR

Run by `start.py` of a packed folder. Prints one line of JSON for each step as soon as it ends, so a
session that is cut off keeps what it found. A step that crashes or hangs costs its own line only.
How long each should take on an H100 stands beside it; these times are estimates, none was measured.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.gpu.variants import SHIPPED, SYMBOLIC
from exporter.decoder.devices import DEVICES

CORRECTNESS_S, SPEED_S = 240, 420
"""Seconds that all steps of a phase should take together."""
LIMIT_FACTOR = 4  # a step is stopped after this many times its estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One process: `module` on one variant of one bundle without weights."""

    module: str
    bundle: str = ""
    variant: str = SHIPPED
    seconds: int  # that it should take, an estimate
    keeps_weights: bool = False  # the next step uses the same ones

    @property
    def name(self) -> str:
        """How the step is called in its line."""
        return f"{self.module} {self.bundle} {self.variant}" if self.bundle else self.module


MACHINE = Step(module="machine", seconds=10)
PRECISIONS = ("fp16", "bf16", "int8wo", "int4wo")
ALSO_UNFUSED = ("fp16", "int4wo")  # their windows are checked with another kernel too

CORRECTNESS = (
    MACHINE,
    # The most doubtful first: windows fold their groups, contrib attention, packed weights.
    *(Step(module="correctness", bundle=f"small-mixed-{each}", seconds=18) for each in PRECISIONS),
    *(Step(module="correctness", bundle=f"small-window-{each}", seconds=16,
           keeps_weights=each in ALSO_UNFUSED)
      for each in PRECISIONS),
    *(Step(module="correctness", bundle=f"small-window-{each}", variant="unfused", seconds=12)
      for each in ALSO_UNFUSED),
    *(Step(module="correctness", bundle=f"small-full-{each}", seconds=14)
      for each in ("fp16", "int4wo")),
)  # fmt: skip

SPEED = (
    MACHINE,
    Step(module="speed", bundle="7b-window-int4wo", seconds=45, keeps_weights=True),
    Step(module="speed", bundle="7b-window-int4wo", variant="unfused", seconds=35,
         keeps_weights=True),
    Step(module="speed", bundle="7b-window-int4wo", variant="masked", seconds=35),
    Step(module="speed", bundle="7b-full-int4wo", seconds=40),
    Step(module="speed", bundle="7b-window-fp16", seconds=75, keeps_weights=True),
    Step(module="speed", bundle="7b-window-fp16", variant="unfused", seconds=55,
         keeps_weights=True),
    Step(module="speed", bundle="7b-window-fp16", variant="masked", seconds=55,
         keeps_weights=True),
    Step(module="speed", bundle="7b-window-fp16", variant=SYMBOLIC, seconds=60),
)  # fmt: skip
PHASES = {"correctness": (CORRECTNESS, CORRECTNESS_S), "speed": (SPEED, SPEED_S)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("--shapes", type=Path, required=True, help="bundles without weights")
    parser.add_argument(
        "--weights",
        type=Path,
        required=True,
        help="an empty folder for weights: 5 GB for correctness, 16 GB for speed",
    )
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default="cuda",
        help="where weights are drawn and the reference is computed",
    )
    given = parser.parse_args()  # fmt: skip
    steps, _ = PHASES[given.phase]
    failed = 0
    for step in steps:
        found = run(step, given.shapes, given.weights, given.device)
        print(json.dumps(found), flush=True)
        failed += not found["ok"]
    return 1 if failed else 0


def run(step: Step, shapes: Path, weights: Path, device: str) -> dict[str, Any]:
    """Run one step; returns its line."""
    began = perf_counter()
    try:
        done = subprocess.run(
            list(command(step, shapes, weights, device)), capture_output=True, text=True,
            timeout=step.seconds * LIMIT_FACTOR, check=False,
        )  # fmt: skip
        ok, lines = done.returncode == 0, done.stdout.strip().splitlines()
        error = None if ok else (done.stderr.strip() or f"exit {done.returncode}")[-800:]
    except subprocess.TimeoutExpired:
        ok, lines, error = False, [], f"stopped after {step.seconds * LIMIT_FACTOR} s"
    finally:
        if not step.keeps_weights and step.bundle:
            shutil.rmtree(weights / step.bundle, ignore_errors=True)
    result = None
    if lines and lines[-1].startswith("{"):
        result = json.loads(lines[-1])
    return {"step": step.name, "ok": ok, "s": round(perf_counter() - began, 1),
            "should_take_s": step.seconds, "result": result,
            **({} if error is None else {"error": error})}  # fmt: skip


def command(step: Step, shapes: Path, weights: Path, device: str) -> Iterator[str]:
    """The command line of a step."""
    yield from (sys.executable, "-m", f"benchmarks.gpu.{step.module}")
    if step.bundle:
        yield from (str(shapes / step.bundle), "--variant", step.variant)
        yield from ("--weights", str(weights), "--device", device)


if __name__ == "__main__":
    sys.exit(main())
