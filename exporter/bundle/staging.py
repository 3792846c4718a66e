"""Write a bundle whole or not at all. Knows nothing about models.

Files are written to a staging directory next to the destination, which the writing process locks,
and which is renamed when it is complete; an older bundle is exchanged with it atomically. A killed
process leaves its staging directory unlocked, and the next export in the same place removes it.
"""

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from exporter.tokenizer.read import TokenizerFiles
from graphs.errors import MistralcError, UsageError
from graphs.manifest import FILE_NAME, SIGNATURE, FileEntry, Manifest
from runtime.bundle.open import sha256

PARTIAL = ".mistralc-partial-"
REPORT = "report/verify.md"
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # renameat2(2)


def check_destination(destination: Path, *, force: bool) -> None:
    """Raise UsageError unless a bundle may be written to `destination`; changes nothing.

    Only another bundle is replaced, and only with `force`.
    """
    parent = destination.absolute().parent
    if not parent.is_dir():
        if parent.exists():
            raise UsageError(
                f"{parent} is a file; expected a directory for the bundle. Choose another path."
            )
        return
    if destination.is_symlink() or destination.is_file():
        raise UsageError(
            f"{destination} exists and is not the directory of a bundle. Choose another name."
        )
    if destination.is_dir() and any(destination.iterdir()):
        if not (destination / FILE_NAME).is_file():
            raise UsageError(
                f"The directory {destination} exists and is not a bundle, so it is never replaced. "
                "Choose another name."
            )
        if not force:
            raise UsageError(
                f"There is a bundle at {destination} already. Choose another name, or add --force "
                "to replace it when the new one is complete."
            )


@contextmanager
def staged(destination: Path) -> Iterator[Path]:
    """Yield a directory that becomes `destination` if the block does not raise.

    Raises MistralcError for an error of the file system in the block, such as a full disk. Nothing
    half-written stays behind in any case.
    """
    destination = destination.absolute()
    staging = destination.parent / f"{PARTIAL}{destination.name}-{os.getpid()}"
    missing = [parent for parent in destination.parents if not parent.exists()]
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(destination.parent)
        staging.mkdir()
        try:
            with _locked(staging):
                yield staging
                _publish(staging, destination)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise _explained(error, destination) from error
    finally:
        for parent in missing:
            with suppress(OSError):  # not empty: the bundle is in it
                parent.rmdir()


def write_model(model: ir.Model, directory: Path) -> None:
    """Write `model.onnx`, whose weights already refer to `weights.safetensors`."""
    ir.save(model, directory / "model.onnx")


def write_tokenizer(files: TokenizerFiles, directory: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `generation_config.json`."""
    (directory / "tokenizer.json").write_text(files.tokenizer_json, encoding="utf-8")
    for name in ("tokenizer_config", "generation_config"):
        write_json(directory / f"{name}.json", getattr(files, name))


def write_json(path: Path, data: Any) -> None:
    """Write indented JSON in UTF-8; only unpaired surrogates are escaped."""
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def list_files(directory: Path, known: Mapping[str, str] | None = None) -> dict[str, FileEntry]:
    """Return size and SHA-256 of every file in a bundle's directory, by name.

    Leaves out the manifest, which cannot contain its own hash, and its signature. `known` are
    hashes that were taken while a file was written, so that 14.5 GB are not read again.
    """
    found = sorted(path for path in directory.rglob("*") if path.is_file())
    names = {path.relative_to(directory).as_posix(): path for path in found}
    return {
        name: FileEntry(size=path.stat().st_size, sha256=(known or {}).get(name) or sha256(path))
        for name, path in names.items()
        if name not in (FILE_NAME, SIGNATURE)
    }


def write_record(manifest: Manifest, report: str, directory: Path) -> Manifest:
    """Write a verification's report, and the manifest that lists it; returns that manifest.

    Both are on the disk before either replaces an old file, so a full disk leaves the bundle whole.
    """
    data = report.encode()
    entry = FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    manifest = replace(manifest, files=dict(sorted({**manifest.files, REPORT: entry}.items())))
    partials = {
        directory / f"{REPORT}.partial": data,
        directory / f"{FILE_NAME}.partial": manifest.to_text().encode(),
    }
    (directory / REPORT).parent.mkdir(exist_ok=True)
    try:
        for partial, contents in partials.items():
            partial.write_bytes(contents)
        for partial in partials:
            partial.replace(partial.with_suffix(""))
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)
    return manifest


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold a lock on a directory; the kernel releases it however this process ends.

    Raises BlockingIOError if another process holds it.
    """
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _remove_leftovers(parent: Path) -> None:
    """Remove the staging directories that killed exports left in `parent`."""
    for leftover in parent.glob(f"{PARTIAL}*"):
        with suppress(OSError), _locked(leftover):
            shutil.rmtree(leftover)


def _publish(staging: Path, destination: Path) -> None:
    """Rename `staging` to `destination`; an older bundle there takes the name of `staging`."""
    if not destination.is_dir():
        staging.rename(destination)
        return
    exchange = ctypes.CDLL(None, use_errno=True).renameat2
    paths = AT_FDCWD, os.fsencode(staging), AT_FDCWD, os.fsencode(destination)
    if exchange(*paths, RENAME_EXCHANGE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(destination))


def _explained(error: OSError, destination: Path) -> MistralcError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MistralcError(
            f"The disk was full before the bundle {destination} was complete; nothing was left "
            "behind. Free some space, or choose a directory on another disk."
        )
    return MistralcError(
        f"The bundle {destination} could not be written: {error}; nothing was left behind. Check "
        "the directory's permissions and the disk."
    )
