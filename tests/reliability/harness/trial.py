"""A trial: inject a fault into a running program at a random moment."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.reliability.harness.fuzz import Counts, location_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One kind of fault for one program; `name` identifies its row in docs/reliability.md.

    `prepare(folder)` writes what all runs need. `run_once(folder, draw)` injects the fault once
    and returns the outcome, "completed" or "refused". It raises AssertionError if the program
    misbehaved.
    """

    name: str
    prepare: Callable[[Path], None]
    run_once: Callable[[Path, random.Random], str]


def run_trial(trial: Trial, folder: Path, times: int) -> Counts:
    """Run the trial `times` times, each with a different random moment."""
    trial.prepare(folder)
    counts = Counts()
    for number in range(times):
        draw = random.Random(f"{trial.name} {number}")  # noqa: S311  (reproducible)
        counts.cases += 1
        try:
            outcome = trial.run_once(folder, draw)
        except AssertionError as error:
            counts.faults[f"{location_of(error)}: {error!s:.200}"] += 1
        else:
            counts.read += outcome == "completed"
            counts.refused += outcome == "refused"
    return counts
