"""Run many cases of every target and trial, count how they end, write docs/reliability.md.

    python -m tests.reliability [--seconds N | --examples N] [--only NAME] [--write]

Each target runs in a process of its own, so that one that takes its process down is a fault like
any other. Exit status 1 where there was a fault.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from time import monotonic

from tests.reliability.explore import Counts, explore
from tests.reliability.registry import TARGETS, TRIALS
from tests.reliability.target import Target
from tests.reliability.trial import Trial, run_trial
from tests.support.documents import DOCS, replace_between

MARKS = "<!-- counted by python -m tests.reliability -->", "<!-- end of the counts -->"
ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("hypothesis", "numpy", "safetensors", "sentencepiece", "tokenizers", "jinja2", "torch",
             "onnxruntime", "fastapi", "uvicorn", "llguidance")  # fmt: skip


def main() -> int:
    """Run what was asked for; returns the exit status."""
    arguments = _arguments()
    if arguments.one is not None:
        print(json.dumps(_one(arguments).to_json()))
        return 0
    names = [one.name for one in (*TARGETS, *TRIALS) if (arguments.only or "") in one.name]
    found = {name: _in_a_process(name, arguments) for name in names}
    text = table(found)
    print(text)
    if arguments.write and arguments.only:
        text = table({**_written(), **found})
    for name, counts in found.items():
        for where, example in counts.examples.items():
            print(f"\n{name}: {where}\n  {example}", file=sys.stderr)
    if arguments.write:
        replace_between(DOCS / "reliability.md", *MARKS, text)
    return int(any(counts.faults for counts in found.values()))


def table(found: dict[str, Counts]) -> str:
    """Markdown: what it ran on, a row for each target, a row for each trial."""
    cases = sum(found[target.name].cases for target in TARGETS if target.name in found)
    faults = sum(sum(counts.faults.values()) for counts in found.values())
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    lines = [
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, {libraries}: {cases:,} cases, {faults:,} faults.",
        "", "| input | cases | read | refused | faults |", "| --- | ---: | ---: | ---: | ---: |",
        *(_row(target.name, found[target.name]) for target in TARGETS if target.name in found),
        "", "| trial | runs | completed | refused | faults |",
        "| --- | ---: | ---: | ---: | ---: |",
        *(_row(trial.name, found[trial.name]) for trial in TRIALS if trial.name in found),
    ]  # fmt: skip
    return "\n".join(lines)


def _written() -> dict[str, Counts]:
    """What the document says already: `--only NAME --write` replaces the rows of that name."""
    rows = re.findall(
        r"^\| ([^|]+?) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$",
        (DOCS / "reliability.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    found = {}
    for name, *numbers in rows:
        cases, read, refused, faults = (int(number.replace(",", "")) for number in numbers)
        found[name] = Counts(cases, read, refused, Counter({"written": faults} if faults else {}))
    return found


def _row(name: str, counts: Counts) -> str:
    faults = sum(counts.faults.values())
    return f"| {name} | {counts.cases:,} | {counts.read:,} | {counts.refused:,} | {faults:,} |"


def _in_a_process(name: str, arguments: argparse.Namespace) -> Counts:
    """Run one target or trial in a child; that the child ended otherwise is a fault."""
    command = [sys.executable, "-m", "tests.reliability", "--one", name]
    many = "--seconds" if arguments.seconds else "--examples"
    command += [many, str(arguments.seconds or arguments.examples)]
    command += ["--trials", str(arguments.trials)]
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, "XDG_CACHE_HOME": home, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False
        )
    if done.returncode == 0:
        return Counts(**json.loads(done.stdout.splitlines()[-1]))
    counts = Counts(cases=1)
    counts.faults[f"the process ended with status {done.returncode}"] = 1
    return counts


def _one(arguments: argparse.Namespace) -> Counts:
    """Run one target or trial here."""
    (chosen,) = (one for one in (*TARGETS, *TRIALS) if one.name == arguments.one)
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(chosen, Trial):
            return run_trial(chosen, Path(folder), arguments.trials)
        return _explore(chosen, Path(folder), arguments)


def _explore(target: Target, folder: Path, arguments: argparse.Namespace) -> Counts:
    if arguments.seconds:
        end = monotonic() + arguments.seconds / len(TARGETS)
        return explore(target, folder, lambda _: monotonic() < end)
    return explore(target, folder, lambda cases: cases < arguments.examples)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    many = parser.add_mutually_exclusive_group()
    many.add_argument("--seconds", type=float, help="for all targets together")
    many.add_argument("--examples", type=int, default=1000, help="of each target; 1000")
    parser.add_argument("--trials", type=int, default=10, help="of each kill or full disk; 10")
    parser.add_argument("--only", help="what the name of a target or trial has to contain")
    parser.add_argument("--write", action="store_true", help="write the table into the document")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
