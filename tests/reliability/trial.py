"""What a trial is: something at work, hurt at a random moment. Knows no command and no server."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.reliability.explore import Counts, _where


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One way to hurt one thing. `name` is what the table calls it.

    `prepare(folder)` puts there what all runs need; `hurt(folder, draw)` returns how one of them
    ended, "completed" or "refused", and raises AssertionError for a fault.
    """

    name: str
    prepare: Callable[[Path], None]
    hurt: Callable[[Path, random.Random], str]


def run_trial(trial: Trial, folder: Path, times: int) -> Counts:
    """Hurt it `times` times, at other moments each time."""
    trial.prepare(folder)
    counts = Counts()
    for number in range(times):
        draw = random.Random(f"{trial.name} {number}")  # noqa: S311  (the same every time)
        counts.cases += 1
        try:
            outcome = trial.hurt(folder, draw)
        except AssertionError as error:
            counts.faults[f"{_where(error)}: {error!s:.200}"] += 1
        else:
            counts.read += outcome == "completed"
            counts.refused += outcome == "refused"
    return counts
