"""Run many cases of every target and trial, count the outcomes, write docs/reliability.md.

    python -m tests.reliability [--seconds N | --examples N] [--only NAME] [--write]

Each target and trial runs in its own process, so a crash of that process counts as a fault too.
The exit status is 1 if there was any fault.
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

from tests.reliability.harness.fuzz import Counts, fuzz
from tests.reliability.harness.target import Target
from tests.reliability.harness.trial import Trial, run_trial
from tests.reliability.registry import TARGETS, TRIALS
from tests.support.documents import DOCS, replace_between

MARKS = "<!-- counted by python -m tests.reliability -->", "<!-- end of the counts -->"
ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("hypothesis", "numpy", "safetensors", "sentencepiece", "tokenizers", "jinja2", "torch",
             "onnxruntime", "fastapi", "uvicorn", "llguidance")  # fmt: skip


def main() -> int:
    """Run the selected targets and trials; return the exit status."""
    arguments = _arguments()
    if arguments.one is not None:
        print(json.dumps(_run_here(arguments).to_json()))
        return 0
    names = [one.name for one in (*TARGETS, *TRIALS) if (arguments.only or "") in one.name]
    found = {name: _run_in_process(name, arguments) for name in names}
    text = table(found)
    print(text)
    if arguments.write and arguments.only:
        text = table({**_documented(), **found})
    for name, counts in found.items():
        for where, example in counts.examples.items():
            print(f"\n{name}: {where}\n  {example}", file=sys.stderr)
    if arguments.write:
        replace_between(DOCS / "reliability.md", *MARKS, text)
    return int(any(counts.faults for counts in found.values()))


def table(found: dict[str, Counts]) -> str:
    """Markdown: machine and versions, then one row per target and one per trial."""
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


def _documented() -> dict[str, Counts]:
    """The counts in the document, of which `--only NAME --write` replaces some rows."""
    rows = re.findall(
        r"^\| ([^|]+?) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$",
        (DOCS / "reliability.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    found = {}
    for name, *numbers in rows:
        cases, read, refused, faults = (int(number.replace(",", "")) for number in numbers)
        found[name] = Counts(
            cases, read, refused, Counter({"documented": faults} if faults else {})
        )
    return found


def _row(name: str, counts: Counts) -> str:
    faults = sum(counts.faults.values())
    return f"| {name} | {counts.cases:,} | {counts.read:,} | {counts.refused:,} | {faults:,} |"


def _run_in_process(name: str, arguments: argparse.Namespace) -> Counts:
    """Run one target or trial in a child process; a nonzero exit status is a fault."""
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


def _run_here(arguments: argparse.Namespace) -> Counts:
    """Run one target or trial in this process."""
    (chosen,) = (one for one in (*TARGETS, *TRIALS) if one.name == arguments.one)
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(chosen, Trial):
            return run_trial(chosen, Path(folder), arguments.trials)
        return _fuzz(chosen, Path(folder), arguments)


def _fuzz(target: Target, folder: Path, arguments: argparse.Namespace) -> Counts:
    if arguments.seconds:
        end = monotonic() + arguments.seconds / len(TARGETS)
        return fuzz(target, folder, lambda _: monotonic() < end)
    return fuzz(target, folder, lambda cases: cases < arguments.examples)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    many = parser.add_mutually_exclusive_group()
    many.add_argument("--seconds", type=float, help="time limit for all targets together")
    many.add_argument("--examples", type=int, default=1000, help="cases per target (default: 1000)")
    parser.add_argument("--trials", type=int, default=10, help="runs per trial (default: 10)")
    parser.add_argument("--only", help="run targets and trials whose name contains this")
    parser.add_argument(
        "--write", action="store_true", help="write the table into docs/reliability.md"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
