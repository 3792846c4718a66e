"""Checkpoints that a test may damage."""

from pathlib import Path

import pytest

from exporter.checkpoint.open import Checkpoint, open_checkpoint
from tests.support.make_checkpoint import tiny_spec, write_checkpoint


@pytest.fixture(scope="session")
def smollm2() -> Checkpoint:
    return open_checkpoint("smollm2")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A Hugging Face checkpoint in one file."""
    return write_checkpoint(tmp_path / "model", tiny_spec())


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same model in shards."""
    return write_checkpoint(tmp_path / "sharded", tiny_spec(), shard_size=100_000)
