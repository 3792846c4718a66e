"""Run every fuzzing target with a few hundred cases, and the two trials of `calibrate`.

`python -m tests.reliability` runs many more of the same cases (docs/reliability.md).
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability.harness.fuzz import ROOT, check
from tests.reliability.harness.guard import outcome_of
from tests.reliability.harness.target import Target
from tests.reliability.registry import TARGETS, TRIALS
from tests.support.documents import DOCS


@pytest.mark.parametrize("target", TARGETS, ids=[target.name for target in TARGETS])
def test_damaged_input_is_read_or_refused_with_a_readable_message(
    target: Target, tmp_path: Path
) -> None:
    counts = check(target, tmp_path)
    assert counts.cases >= target.examples / 2, "hypothesis generated too few distinct cases"
    if target.name != "hash cache":  # the bundle opens whatever the cache holds
        assert counts.refused, "no case was damaged enough to be refused"


@pytest.mark.parametrize("target", TARGETS, ids=[target.name for target in TARGETS])
def test_the_undamaged_input_is_read(target: Target, tmp_path: Path) -> None:
    prepared = target.prepare(tmp_path)
    if prepared.good is not None:
        outcome = outcome_of(lambda: prepared.read(prepared.good), 1 << 20)
        assert outcome == "read", "cases would be refused for a reason other than the damage"


@pytest.mark.parametrize("name", ["calibrate, killed", "calibrate, disk full"])
def test_an_interrupted_calibration_leaves_a_complete_table_or_none(name: str) -> None:
    """tests/exporter/test_interrupted_export.py does this for exports, at chosen moments."""
    # in its own process, which has no threads: the runs are forks of it
    command = [sys.executable, "-m", "tests.reliability", "--one", name, "--trials", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert (counts["cases"], counts["faults"]) == (2, {})


def test_the_reliability_document_lists_every_target_and_trial() -> None:
    text = (DOCS / "reliability.md").read_text(encoding="utf-8")
    for one in (*TARGETS, *TRIALS):
        assert re.search(rf"^\| {re.escape(one.name)} \| [\d,]+ ", text, re.MULTILINE), (
            f"{one.name} is not in the table: run python -m tests.reliability --write"
        )
