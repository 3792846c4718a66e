"""Weights that are read ahead are the same weights, and each is read ahead once in a pass."""

import os
from pathlib import Path

import pytest
import torch

from exporter.checkpoint import read_ahead
from exporter.checkpoint.open import Checkpoint, open_checkpoint
from exporter.checkpoint.read_ahead import ReadAhead
from graphs.errors import MistralcError
from tests.support.make_checkpoint import tiny_spec, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("ahead") / "checkpoint"
    return open_checkpoint(write_checkpoint(path, tiny_spec(), dtype="bf16"))


def test_a_pass_returns_every_weight_and_reads_each_later_one_ahead_once(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = list(checkpoint.spec.weight_shapes())
    largest = max(checkpoint.stored[name].nbytes for name in names)
    monkeypatch.setattr(read_ahead, "AHEAD", 2 * largest)
    monkeypatch.setattr(read_ahead, "STEP", 1000)
    ranges: list[tuple[int, int]] = []
    real = os.preadv

    def preadv(file: int, buffers: list[memoryview], offset: int) -> int:
        ranges.append((offset, len(buffers[0])))
        return real(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    for _ in range(2):
        read = ReadAhead(checkpoint)
        for _ in range(2):
            for name in names:
                assert torch.equal(read(name), checkpoint.tensor(name)), name
        read._reader.shutdown()
        wanted = [where for name in names[1:] for where in checkpoint.stored[name].ranges]
        assert sum(length for _, length in ranges) == 2 * sum(where.length for where in wanted)
        assert {offset for offset, _ in ranges} >= {where.offset for where in wanted}
        ranges.clear()


def test_any_other_order_is_right_too(checkpoint: Checkpoint) -> None:
    read = ReadAhead(checkpoint)
    for name in reversed(checkpoint.spec.weight_shapes()):
        assert torch.equal(read(name), checkpoint.tensor(name)), name


def test_a_file_that_went_away_is_reported_by_the_weight_itself(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    copy = write_checkpoint(tmp_path / "copy", tiny_spec(), dtype="bf16")
    read = ReadAhead(open_checkpoint(copy))
    names = list(checkpoint.spec.weight_shapes())
    read(names[0])
    (copy / "model.safetensors").unlink()
    with pytest.raises(MistralcError, match="changed while it was being read"):
        read(names[1])
