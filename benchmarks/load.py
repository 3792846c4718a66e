"""Measure the time from starting `mistralc generate` to the first token.

    python -m benchmarks.load BUNDLE … [--rounds 5]

Generates one token per bundle in turn, each time in a new process. The first round, which brings
the files into memory, does not count. Prints the machine and a Markdown table of medians: the
whole process with imports and checks, and the parts that `generate --json` reports.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

from runtime.measure.bench import machine

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rounds = [[start(bundle) for bundle in arguments.bundles] for _ in range(arguments.rounds + 1)]
    print(json.dumps(machine()))
    print("| bundle | whole process | checking and loading | first token |")
    print("| --- | ---: | ---: | ---: |")
    for bundle, seen in zip(arguments.bundles, zip(*rounds[1:], strict=True), strict=True):
        seconds = [f"{median(column):.2f} s" for column in zip(*seen, strict=True)]
        print(f"| {bundle.name} | {' | '.join(seconds)} |")


def start(bundle: Path) -> tuple[float, float, float]:
    """Seconds of the whole process, of loading, and from there to the first token."""
    began = perf_counter()
    done = subprocess.run(
        [sys.executable, ROOT / "mistralc.py", "generate", bundle, "The ring", "-n", "1", "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    timings = json.loads(done.stdout)["timings"]
    return perf_counter() - began, timings["load_s"], timings["ttft_s"]


if __name__ == "__main__":
    main()
