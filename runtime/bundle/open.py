"""Open a bundle: check every file before any is loaded. Knows no backend.

Hashing 15 GB takes longer than loading it, so a file is trusted if its size, times and inode are
the same as when it was last hashed. The cache of hashes is per user and may be deleted at any time.
That finds accidents. If a signature is required, an attacker is expected: the signature is checked
before the manifest is parsed, every file is hashed, and a file that is not listed is refused.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphs.errors import MistralcError
from graphs.manifest import (
    FILE_NAME,
    SIGNATURE,
    FileEntry,
    Manifest,
    manifest_bytes,
    parse_manifest,
)
from runtime.bundle.signature import check_signature, required_key
from runtime.system.cache import cache_directory

BLOCK = 1 << 22  # bytes read at once while hashing: 4 MiB

SETTLED_NS = 2_000_000_000
"""Nanoseconds after a change until another change is sure to show in the file's times.

Kernels stamp files with a clock that moves in steps of up to 10 ms, and some file systems keep
times to two seconds. A file that changes again within such a step looks untouched, so its hash is
not remembered.
"""

TOKENIZER = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
Progress = Callable[[int], None]  # called with the number of bytes just hashed


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A checked bundle: its directory and what its manifest says.

    `signed_by` is the fingerprint of the required key; None if no signature was required.
    """

    path: Path
    manifest: Manifest
    signed_by: str | None = None


def open_bundle(
    path: Path, progress: Progress | None = None, *, require_signature: Path | None = None
) -> Bundle:
    """Check every file in directory `path` against its manifest, and return the bundle.

    `require_signature` is the file of a public key; without it, the environment may name one
    (`runtime.bundle.signature.VARIABLE`). Raises MistralcError, naming the file, if a file is
    missing, truncated, changed or a link, if the manifest's schema is unknown, or if a required
    signature is missing or by another key.
    """
    key = required_key(require_signature)
    data = manifest_bytes(path)
    signed_by = None if key is None else check_signature(data, path, key)
    manifest = parse_manifest(data, path)
    check_files(path, manifest, progress, in_full=key is not None)
    return Bundle(path=path, manifest=manifest, signed_by=signed_by)


def check_files(
    path: Path, manifest: Manifest, progress: Progress | None = None, *, in_full: bool
) -> None:
    """Check the files in directory `path` against their manifest; raises as `open_bundle` does.

    `in_full` hashes every file without using the cache, and refuses files that are not listed.
    """
    _check_names(path, manifest)
    if in_full:
        _check_unlisted(path, manifest)
    cache = _HashCache(None if in_full else cache_file())
    for name, entry in manifest.files.items():
        try:
            _check_file(path / name, entry, cache, progress)
        except OSError as error:
            raise MistralcError(
                f"{path / name!s:.300} could not be read ({error.strerror}); expected a file that "
                "this user may read. Check its permissions and the disk."
            ) from error
    cache.save()


def sha256(path: Path, progress: Progress | None = None) -> str:
    """Return the SHA-256 of a file in hexadecimal, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            if progress is not None:
                progress(len(block))
    return digest.hexdigest()


def _check_names(path: Path, manifest: Manifest) -> None:
    """Refuse a manifest that lists files outside its bundle, or lacks one that will be loaded."""
    for name in (*TOKENIZER, *manifest.known_target.loaded_files):
        if name not in manifest.files:
            raise MistralcError(
                f"{path / FILE_NAME} does not list {name}, which a bundle for {manifest.target} "
                "has, so it cannot be checked. Export the checkpoint again."
            )
    for name in manifest.files:
        parts = Path(name).parts
        outside = Path(name).is_absolute() or ".." in parts or not parts
        if outside or any((path / folder).is_symlink() for folder in Path(name).parents[:-1]):
            raise MistralcError(
                f"{path / FILE_NAME} lists the file {name!r}, which is not inside the bundle. "
                "Do not use this bundle; export it again."
            )


def _check_unlisted(path: Path, manifest: Manifest) -> None:
    """Refuse files that are not listed. A directory is not a file, but a link to one is."""
    expected = {FILE_NAME, SIGNATURE, *manifest.files}
    for found in sorted(path.rglob("*")):
        name = found.relative_to(path).as_posix()
        if name not in expected and (found.is_symlink() or not found.is_dir()):
            raise MistralcError(
                f"{found} is not listed in the signed {FILE_NAME}; expected a bundle with only the "
                "files that were signed. Remove it, or copy the bundle again from where "
                "it was signed."
            )


def _check_file(
    path: Path, entry: FileEntry, cache: "_HashCache", progress: Progress | None
) -> None:
    remedy = "Copy the bundle again from where it was built, or export it again."
    if path.is_symlink() or not path.is_file():
        got = "a symbolic link, which backends refuse" if path.is_symlink() else "missing"
        raise MistralcError(f"{path} is {got}; the manifest lists it as a file. {remedy}")
    size = path.stat().st_size
    if size != entry.size:
        raise MistralcError(
            f"{path} has {size:,} bytes; the manifest expects {entry.size:,}. {remedy}"
        )
    # Before hashing: a file that changes meanwhile will be hashed again.
    seen_ns, identity = time.time_ns(), _identity(path)
    digest = cache.get(path, identity)
    if digest is None:
        digest = sha256(path, progress)
        cache.put(path, identity, digest, seen_ns)
    if digest != entry.sha256:
        raise MistralcError(
            f"{path} was changed after the bundle was written: its SHA-256 is {digest[:12]}…, the "
            f"manifest expects {entry.sha256[:12]}…. {remedy}"
        )


def cache_file() -> Path | None:
    """Return the path of the cache of hashes; None for a user without a home, as in containers."""
    directory = cache_directory()
    return None if directory is None else directory / "hashes.json"


class _HashCache:
    """SHA-256 of files that have not changed since. Losing it costs time, never safety."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._entries: dict[str, Any] = {}
        self._changed = False
        if path is None:
            return
        with suppress(OSError, ValueError, RecursionError):
            loaded = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(loaded, dict):
                self._entries = loaded

    def get(self, path: Path, identity: list[int]) -> str | None:
        entry = self._entries.get(str(path.resolve()))
        if isinstance(entry, list) and entry[:-1] == identity:
            return str(entry[-1])
        return None

    def put(self, path: Path, identity: list[int], digest: str, seen_ns: int) -> None:
        """Remember a digest, unless the file changed within `SETTLED_NS` before `seen_ns`."""
        _size, _modified, changed, *_ = identity
        if seen_ns - changed < SETTLED_NS:
            return
        self._entries[str(path.resolve())] = [*identity, digest]
        self._changed = True

    def save(self) -> None:
        """Write the cache, whole or not at all; a read-only home is not an error."""
        if self.path is None or not self._changed:
            return
        with suppress(OSError):
            kept = {name: entry for name, entry in self._entries.items() if Path(name).exists()}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_name(f"{self.path.name}.{os.getpid()}")
            partial.write_text(json.dumps(kept), encoding="utf-8")
            partial.replace(self.path)


def _identity(path: Path) -> list[int]:
    """What changes when a file's bytes do. A program cannot set the change time (ctime) back."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]
