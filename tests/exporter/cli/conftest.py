"""Fixtures for tests of `export`."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def checkpoint(sliding_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of `sliding_checkpoint` that a test may damage."""
    return Path(shutil.copytree(sliding_checkpoint, tmp_path / "checkpoint"))
