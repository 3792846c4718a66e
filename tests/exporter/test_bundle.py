"""Bundles: what is in them, and how they are written whole or not at all. Runs no model."""

import hashlib
import os
import re
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import onnx
import pytest
import safetensors
import torch

from exporter.bundle import staging as writing
from exporter.checkpoint.open import open_checkpoint
from graphs.errors import MistralcError
from graphs.manifest import read_manifest

ROOT = Path(__file__).resolve().parents[2]


def files_of(bundle: Path) -> dict[str, Path]:
    """Every file of a directory by its path inside it."""
    return {p.relative_to(bundle).as_posix(): p for p in bundle.rglob("*") if not p.is_dir()}


# What is in it


@pytest.fixture(params=["sliding", "plain"])
def kind(request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """A bundle and its checkpoint, with a window and without one."""
    name = request.param
    return request.getfixturevalue(f"{name}_bundle"), request.getfixturevalue(f"{name}_checkpoint")


def test_a_bundle_has_exactly_the_files_that_its_manifest_lists(kind: tuple[Path, Path]) -> None:
    bundle, _ = kind
    there = files_of(bundle)
    del there["manifest.json"]
    listed = read_manifest(bundle).files
    assert there.keys() == listed.keys()
    assert {"model.onnx", "weights.safetensors", "tokenizer.json"} <= there.keys()
    for name, path in there.items():
        assert listed[name].size == path.stat().st_size
        assert listed[name].sha256 == hashlib.sha256(path.read_bytes()).hexdigest(), name


def test_a_bundle_does_not_say_where_when_or_on_which_machine_it_was_made(
    kind: tuple[Path, Path],
) -> None:
    bundle, checkpoint = kind
    traces = {str(ROOT), str(bundle.parent), str(checkpoint.parent), str(Path.home()), sys.prefix}
    host = socket.gethostname()
    traces |= {host} if len(host) > 5 else set()  # a short name may be part of any word
    traces -= {"/", "/root"}  # a home that short may be part of a tensor's name
    for name, path in files_of(bundle).items():
        data = path.read_bytes()
        for trace in traces:
            assert trace.encode() not in data, f"{name} holds {trace}"
        if name != "weights.safetensors":  # random bytes may spell anything
            assert not re.search(rb"\b20\d\d-[01]\d-[0-3]\d|\b[012]\d:[0-5]\d:[0-5]\d", data), (
                f"{name} holds a date or a time, so two exports would differ"
            )


def test_exports_of_one_checkpoint_are_equal_byte_for_byte_across_processes(
    sliding_bundle: Path, sliding_checkpoint: Path, tmp_path: Path
) -> None:
    # Another process, hash seed, time zone and working directory: what might leak into files.
    again = tmp_path / "elsewhere" / "another-name"
    environment = {**os.environ, "PYTHONHASHSEED": "1", "TZ": "Asia/Kathmandu"}
    command = [sys.executable, "-m", "mistralc", "export", sliding_checkpoint, "-o", again]
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    first, second = files_of(sliding_bundle), files_of(again)
    assert first.keys() == second.keys()
    for name, path in first.items():
        assert path.read_bytes() == second[name].read_bytes(), f"{name} differs between exports"


def test_the_weights_are_a_safetensors_file_of_the_checkpoints_tensors(
    kind: tuple[Path, Path],
) -> None:
    bundle, source = kind
    checkpoint = open_checkpoint(source)
    with safetensors.safe_open(bundle / "weights.safetensors", framework="pt") as file:
        assert set(file.keys()) == checkpoint.spec.weight_shapes().keys()
        for name in file.keys():  # noqa: SIM118  (not a mapping)
            assert torch.equal(file.get_tensor(name), checkpoint.tensor(name)), name


def test_the_graphs_external_data_are_byte_ranges_of_the_weights_file(
    kind: tuple[Path, Path],
) -> None:
    bundle, source = kind
    checkpoint = open_checkpoint(source)
    data = (bundle / "weights.safetensors").read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    ranges = []
    for tensor in graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if not where:
            small = len(tensor.raw_data) < 1024 or tensor.name.startswith("rotary_")
            assert small, f"{tensor.name} lies in the graph itself"
            continue
        assert where["location"] == "weights.safetensors"
        begin, length = int(where["offset"]), int(where["length"])
        ranges.append((begin, begin + length))
        parts = parts_of(tensor.name)
        expected = b"".join(bytes(checkpoint.tensor(part).numpy().data) for part in parts)
        assert data[begin : begin + length] == expected, tensor.name
    ranges.sort()
    assert ranges[0][0] == header
    assert ranges[-1][1] == len(data)
    assert all(a[1] == b[0] for a, b in pairwise(ranges)), (
        "every byte of the weights belongs to exactly one tensor of the graph"
    )
    merged = [t.name for t in graph.initializer if len(parts_of(t.name)) > 1 and t.external_data]
    assert len(merged) == 2 * checkpoint.spec.num_hidden_layers, "q/k/v and gate/up are merged"


def parts_of(name: str) -> list[str]:
    """Return the checkpoint's tensors that a tensor of the graph consists of."""
    for merged, parts in {
        "qkv_proj": "q_proj k_proj v_proj",
        "gate_up_proj": "gate_proj up_proj",
    }.items():
        if f".{merged}." in name:
            return [name.replace(merged, part) for part in parts.split()]
    return [name]


# Writing


def test_what_was_staged_appears_whole_when_the_block_ends(tmp_path: Path) -> None:
    destination = tmp_path / "new" / "bundle"
    with writing.staged(destination) as directory:
        (directory / "file").write_bytes(b"1")
        assert not destination.exists(), "nothing may be seen before it is complete"
    assert (destination / "file").read_bytes() == b"1"
    assert [path.name for path in destination.parent.iterdir()] == ["bundle"]


def test_a_failure_leaves_neither_files_nor_the_directories_made_for_them(tmp_path: Path) -> None:
    def fail() -> None:
        with writing.staged(tmp_path / "a" / "b" / "bundle") as directory:
            (directory / "file").write_bytes(b"1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_older_bundle_is_exchanged_for_the_new_one_in_one_step(tmp_path: Path) -> None:
    destination = tmp_path / "bundle"
    destination.mkdir()
    (destination / "old").touch()
    with writing.staged(destination) as directory:
        (directory / "new").touch()
        assert [path.name for path in destination.iterdir()] == ["old"]
    assert [path.name for path in destination.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_leftover_is_removed_and_a_running_export_is_not(tmp_path: Path) -> None:
    leftover = tmp_path / f"{writing.PARTIAL}killed-1"
    leftover.mkdir()
    (leftover / "weights.safetensors").write_bytes(b"half")
    with writing.staged(tmp_path / "one") as first:
        assert not leftover.exists()
        with writing.staged(tmp_path / "two"):
            assert first.is_dir(), "an export swept away another that is still at work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_a_second_export_to_the_same_place_fails_and_leaves_the_first_alone(tmp_path: Path) -> None:
    # Two containers that share a directory may well have the same process number.
    def again() -> None:
        with writing.staged(tmp_path / "bundle"):
            pytest.fail("two exports wrote into one directory")

    with writing.staged(tmp_path / "bundle") as first:
        (first / "file").touch()
        with pytest.raises(MistralcError, match="could not be written"):
            again()
    assert (tmp_path / "bundle" / "file").exists()
