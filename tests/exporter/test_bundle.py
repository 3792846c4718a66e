"""A bundle on disk: what is in it, how it is opened, how it is written. Runs no model."""

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnx
import pytest
import safetensors
import torch

from exporter.bundle import staging as writing
from exporter.checkpoint.open import open_checkpoint
from graphs.errors import MistralcError
from graphs.manifest import CHECKSUM, FileEntry, Manifest, parse_manifest, read_manifest
from runtime.bundle import open as opening
from runtime.bundle.open import open_bundle

Copy = Callable[[Path], Path]

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
    # Another process, hash seed, time zone and working directory: what sneaks into files.
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
        for name in file.keys():  # noqa: SIM118  (it is no mapping)
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
    """The checkpoint's tensors that one of the graph's is made of."""
    for merged, parts in {
        "qkv_proj": "q_proj k_proj v_proj",
        "gate_up_proj": "gate_proj up_proj",
    }.items():
        if f".{merged}." in name:
            return [name.replace(merged, part) for part in parts.split()]
    return [name]


# The manifest


def test_a_manifest_written_and_read_is_the_same(kind: tuple[Path, Path]) -> None:
    manifest = read_manifest(kind[0])
    assert Manifest.from_text(manifest.to_text(), "manifest.json") == manifest
    assert manifest.to_text() == (kind[0] / "manifest.json").read_text(encoding="utf-8")


def test_a_manifest_with_any_byte_changed_is_refused(sliding_bundle: Path) -> None:
    # Such as the window's "8" becoming a "9", a space a tab, or a float's last digit another.
    data = (sliding_bundle / "manifest.json").read_bytes()
    for i in range(len(data)):
        flipped = data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]
        with pytest.raises(MistralcError):
            parse_manifest(flipped, sliding_bundle)


def test_a_manifest_cut_short_anywhere_is_refused(sliding_bundle: Path) -> None:
    data = (sliding_bundle / "manifest.json").read_bytes()
    for end in range(len(data)):
        with pytest.raises(MistralcError, match=r"is not a bundle's manifest|was changed after"):
            parse_manifest(data[:end], sliding_bundle)


@pytest.mark.parametrize(
    "layout",
    [
        lambda text: json.dumps(json.loads(text), sort_keys=True),
        lambda text: text.replace('"schema"', '"\\u0073chema"', 1),
        lambda text: text.replace("{", '{"schema": 1,', 1),
        lambda text: text + "\n",
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "\ufeff" + text,
    ],
    ids=["compact", "escaped", "a field twice", "a line more", "CRLF", "byte order mark"],
)
def test_a_manifest_that_says_the_same_in_another_layout_is_refused(
    sliding_bundle: Path, layout: Callable[[str], str]
) -> None:
    # What is signed is bytes, and what is read is what they say: one text for one meaning.
    text = (sliding_bundle / "manifest.json").read_text(encoding="utf-8")
    with pytest.raises(MistralcError, match=r"is not a bundle's manifest|was changed after"):
        parse_manifest(layout(text).encode(), sliding_bundle)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"schema": 2}, r"schema 2 .* newer version"),
        ({"schema": "one"}, r"schema 'one' .* another version"),
        ({"surprise": 1}, "manifest_sha256"),
        ({"files": None}, "manifest_sha256"),
        ({CHECKSUM: None}, "manifest_sha256"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_manifest_of_another_form_is_refused_with_the_reason(
    sliding_bundle: Path, change: Mapping[str, Any], expected: str
) -> None:
    text = (sliding_bundle / "manifest.json").read_text(encoding="utf-8")
    with pytest.raises(MistralcError, match=expected):
        Manifest.from_text(json.dumps({**json.loads(text), **change}), "manifest.json")


@pytest.mark.parametrize("text", ["", "[]", "1", "null", '"text"', "{}", "[" * 100_000, "1" * 5000])
def test_what_is_no_manifest_at_all_is_refused(text: str) -> None:
    with pytest.raises(MistralcError, match=r"manifest\.json is not a bundle's manifest"):
        Manifest.from_text(text, "manifest.json")


# Opening


@pytest.fixture
def hashes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The names of the files that opening a bundle has hashed, with an empty cache at first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(opening, "SETTLED_NS", 0)  # tests do not wait for a copy to settle
    names: list[str] = []
    real = opening.sha256

    def noting(path: Path, progress: opening.Progress | None = None) -> str:
        names.append(path.name)
        return real(path, progress)

    monkeypatch.setattr(opening, "sha256", noting)
    return names


def test_a_bundle_opened_again_is_not_hashed_again(
    sliding_bundle: Path, copy_of: Copy, hashes: list[str]
) -> None:
    bundle = copy_of(sliding_bundle)
    manifest = open_bundle(bundle).manifest
    assert len(hashes) == len(manifest.files)
    hashes.clear()
    assert open_bundle(bundle).manifest == manifest
    assert hashes == []


def test_a_file_that_has_only_just_changed_is_not_remembered(
    sliding_bundle: Path, copy_of: Copy, hashes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # It could change again within the same step of the file system's clock, unseen.
    bundle = copy_of(sliding_bundle)
    hour = 3600 * 10**9  # longer than this test runs
    monkeypatch.setattr(opening, "SETTLED_NS", hour)
    first = open_bundle(bundle).manifest
    hashes.clear()
    open_bundle(bundle)
    assert len(hashes) == len(first.files)


def test_a_file_that_was_touched_is_hashed_again(
    sliding_bundle: Path, copy_of: Copy, hashes: list[str]
) -> None:
    bundle = copy_of(sliding_bundle)
    open_bundle(bundle)
    hashes.clear()
    os.utime(bundle / "model.onnx", ns=(1, 1))
    open_bundle(bundle)
    assert hashes == ["model.onnx"]


def test_a_change_is_noticed_although_size_and_modification_time_are_as_before(
    sliding_bundle: Path, copy_of: Copy, hashes: list[str]
) -> None:
    bundle = copy_of(sliding_bundle)
    open_bundle(bundle)
    weights = bundle / "weights.safetensors"
    before = weights.stat()
    time.sleep(0.05)  # a file system's clock moves in steps of up to 10 ms
    flip(weights, before.st_size // 2)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    hashes.clear()
    with pytest.raises(MistralcError, match=r"weights\.safetensors was changed after"):
        open_bundle(bundle)
    assert "weights.safetensors" in hashes


def test_a_change_while_a_file_is_hashed_is_noticed_the_next_time(
    sliding_bundle: Path, copy_of: Copy, hashes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = copy_of(sliding_bundle)
    real = opening.sha256

    def slow(path: Path, progress: opening.Progress | None = None) -> str:
        digest = real(path, progress)
        if path.name == "model.onnx":  # someone writes between the last read and the end
            flip(path, 1000)
            os.utime(path, ns=(1, 1))
        return digest

    monkeypatch.setattr(opening, "sha256", slow)
    open_bundle(bundle)
    monkeypatch.setattr(opening, "sha256", real)
    with pytest.raises(MistralcError, match=r"model\.onnx was changed after"):
        open_bundle(bundle)
    assert hashes.count("model.onnx") == 2


@pytest.mark.parametrize("content", ["", "not JSON", "[]", '{"/x": 3}'])
def test_a_damaged_hash_cache_costs_time_and_nothing_else(
    sliding_bundle: Path, hashes: list[str], tmp_path: Path, content: str
) -> None:
    cache = tmp_path / "cache" / "mistralc" / "hashes.json"
    cache.parent.mkdir(parents=True)
    cache.write_text(content, encoding="utf-8")
    files = open_bundle(sliding_bundle).manifest.files
    assert len(hashes) == len(files)


def test_a_user_without_a_home_opens_bundles_too(
    sliding_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in a container that runs under a bare user number.
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def nowhere(_cls: type[Path]) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", classmethod(nowhere))
    assert open_bundle(sliding_bundle).path == sliding_bundle


def test_a_cache_that_cannot_be_written_is_no_error(
    sliding_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("in the way", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(occupied))
    assert open_bundle(sliding_bundle).path == sliding_bundle


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "report/../../outside", ""])
def test_a_manifest_that_names_a_file_outside_the_bundle_is_refused(
    sliding_bundle: Path, copy_of: Copy, name: str
) -> None:
    bundle = copy_of(sliding_bundle)
    outside = bundle.parent / "outside"
    outside.write_bytes(b"secret")
    entry = FileEntry(size=6, sha256=hashlib.sha256(b"secret").hexdigest())
    relist(bundle, {name: entry})
    with pytest.raises(MistralcError, match="not inside the bundle"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    "name", ["model.onnx", "weights.safetensors", "tokenizer.json", "generation_config.json"]
)
def test_a_manifest_that_leaves_out_a_file_that_would_be_loaded_is_refused(
    sliding_bundle: Path, copy_of: Copy, name: str
) -> None:
    bundle = copy_of(sliding_bundle)
    manifest = read_manifest(bundle)
    files = {each: entry for each, entry in manifest.files.items() if each != name}
    text = replace(manifest, files=files).to_text()
    (bundle / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(MistralcError, match=f"does not list {re.escape(name)}"):
        open_bundle(bundle)


def test_a_file_that_became_a_symbolic_link_is_refused_though_its_bytes_are_right(
    sliding_bundle: Path, copy_of: Copy
) -> None:
    bundle = copy_of(sliding_bundle)
    real = bundle.parent / "weights"
    (bundle / "weights.safetensors").rename(real)
    (bundle / "weights.safetensors").symlink_to(real)
    with pytest.raises(MistralcError, match=r"weights\.safetensors is a symbolic link"):
        open_bundle(bundle)


def test_a_missing_file_is_named(sliding_bundle: Path, copy_of: Copy) -> None:
    bundle = copy_of(sliding_bundle)
    (bundle / "tokenizer_config.json").unlink()
    with pytest.raises(MistralcError, match=r"tokenizer_config\.json is missing"):
        open_bundle(bundle)


def test_a_file_cut_short_is_noticed_by_its_size_without_hashing(
    sliding_bundle: Path, copy_of: Copy, hashes: list[str]
) -> None:
    bundle = copy_of(sliding_bundle)
    weights = bundle / "weights.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    with pytest.raises(MistralcError, match=r"has [\d,]+ bytes; the manifest expects"):
        open_bundle(bundle)
    assert "weights.safetensors" not in hashes


def test_a_file_that_the_system_refuses_to_read_is_an_error_that_names_it(
    sliding_bundle: Path, copy_of: Copy
) -> None:
    bundle = copy_of(sliding_bundle)
    endless = "n" * 300  # longer than a file name may be: the system refuses to look
    relist(bundle, {endless: FileEntry(size=1, sha256="0" * 64)})
    with pytest.raises(MistralcError, match="could not be read"):
        open_bundle(bundle)


def flip(path: Path, at: int) -> None:
    """Flip one bit of a file in place."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def relist(bundle: Path, more: Mapping[str, FileEntry]) -> None:
    """Write the manifest again, intact in itself, with `more` files in its list."""
    manifest = read_manifest(bundle)
    manifest = replace(manifest, files={**manifest.files, **more})
    (bundle / "manifest.json").write_text(manifest.to_text(), encoding="utf-8")


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


def test_a_leftover_is_swept_and_an_export_at_work_is_not(tmp_path: Path) -> None:
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
