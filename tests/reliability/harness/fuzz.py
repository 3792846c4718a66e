"""Run many cases of one target and count the outcomes. Knows nothing about any target."""

import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.reliability.harness.guard import outcome_of
from tests.reliability.harness.target import Prepared, Target

ROOT = Path(__file__).resolve().parents[3]
BATCH = 200  # cases per seed


@dataclass(slots=True)
class Counts:
    """Outcomes of the cases of one target; `faults` counts them by where they were raised."""

    cases: int = 0
    read: int = 0
    refused: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)  # one case per fault, truncated

    def to_json(self) -> dict[str, Any]:
        """Plain data; `Counts(**data)` restores it."""
        return {one.name: getattr(self, one.name) for one in fields(self)}


def fuzz(target: Target, folder: Path, wanted: Callable[[int], bool]) -> Counts:
    """Run cases in batches while `wanted(cases so far)` holds; count faults, do not raise them."""
    prepared, counts, number = target.prepare(folder), Counts(), 0
    while wanted(counts.cases):
        options = settings(_OPTIONS, max_examples=BATCH, phases=(Phase.generate,))
        seed(number)(options(given(prepared.cases)(_counting(prepared, counts))))()
        number += 1
    return counts


def check(target: Target, folder: Path) -> Counts:
    """Run the same few cases on every call; shrink and raise the first fault."""
    prepared, counts = target.prepare(folder), Counts()

    def one(case: Any) -> None:
        _count(counts, outcome_of(lambda: prepared.read(case), prepared.size(case)))

    options = settings(
        _OPTIONS, max_examples=target.examples, derandomize=True,
        phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    options(given(prepared.cases)(one))()
    return counts


_OPTIONS = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))


def _counting(prepared: Prepared, counts: Counts) -> Callable[[Any], None]:
    def one(case: Any) -> None:
        try:
            _count(counts, outcome_of(lambda: prepared.read(case), prepared.size(case)))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # `Hang` and Rust panics are not of type Exception
            where = location_of(error)
            counts.cases += 1
            counts.faults[where] += 1
            counts.examples.setdefault(where, f"{error!s:.300}: {case!r:.2000}")

    return one


def _count(counts: Counts, outcome: str) -> None:
    counts.cases += 1
    counts.read += outcome == "read"
    counts.refused += outcome == "refused"


def location_of(error: BaseException) -> str:
    """The error's type and the innermost frame of this repository, preferably not in tests."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(ROOT)]
    inner = [frame for frame in own if "/tests/" not in frame.filename] or own
    path = Path(inner[-1].filename).relative_to(ROOT)
    return f"{type(error).__name__} in {path}, {inner[-1].name}, line {inner[-1].lineno}"
