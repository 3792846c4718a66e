"""Opening a bundle: which files are hashed, and what is refused. Runs no model."""

import hashlib
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from graphs.errors import MistralcError
from graphs.manifest import FileEntry, read_manifest
from runtime.bundle import open as opening
from runtime.bundle.open import open_bundle

Copy = Callable[[Path], Path]


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
