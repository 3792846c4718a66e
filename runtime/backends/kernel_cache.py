"""Kernels that TensorRT-RTX compiled for this GPU, kept for the next start. Knows no TensorRT.

A file per plan in the user's cache, never in the bundle: a bundle is the same on every host, these
kernels are not. Losing or damaging it costs time at the next start, and nothing else: the file
begins with the SHA-256 of its contents, and is ignored where that does not fit.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from runtime.system.atomic_file import replacing

_DIGEST = hashlib.sha256().digest_size


def cache_file(plan_sha256: str) -> Path | None:
    """Where the kernels of a plan are kept; None for a user without a home."""
    return _cached("kernels", plan_sha256)


def timing_file(version: str) -> Path | None:
    """Where the builder of this version of TensorRT keeps what it measured; None likewise."""
    return _cached("timings", f"tensorrt-{version}")


def _cached(folder: str, name: str) -> Path | None:
    home = os.environ.get("XDG_CACHE_HOME")
    with suppress(RuntimeError):
        home = home or str(Path.home() / ".cache")
    return Path(home) / "mistralc" / folder / f"{name}.bin" if home else None


def read(path: Path) -> bytes | None:
    """The kernels in `path`; None when there are none, or they are damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, kernels = data[:_DIGEST], data[_DIGEST:]
    return kernels if kernels and hashlib.sha256(kernels).digest() == digest else None


def write(path: Path, kernels: bytes) -> bool:
    """Put the kernels there, whole or not at all; False when that cannot be done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(hashlib.sha256(kernels).digest() + kernels)
    except OSError:
        return False
    return True
