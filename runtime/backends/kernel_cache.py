"""Keep the kernels that TensorRT-RTX compiled for this GPU, for the next start. No TensorRT here.

There is one file for each plan. It is in the user's cache and never in the bundle, because a
bundle is the same on every host and these kernels are not. A lost or damaged file only costs time
at the next start: it begins with the SHA-256 of its contents and is ignored if that does not match.
"""

import hashlib
from pathlib import Path

from runtime.system.atomic_file import replacing
from runtime.system.cache import cache_directory

_DIGEST = hashlib.sha256().digest_size


def kernels_file(plan_sha256: str) -> Path | None:
    """The file for the kernels of a plan; None for a user without a home directory."""
    return _file("kernels", plan_sha256)


def timing_file(version: str) -> Path | None:
    """The file for the kernel timings of this version of TensorRT's builder; None likewise."""
    return _file("timings", f"tensorrt-{version}")


def read(path: Path) -> bytes | None:
    """Read the kernels in `path`; None if the file is missing or damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, kernels = data[:_DIGEST], data[_DIGEST:]
    return kernels if kernels and hashlib.sha256(kernels).digest() == digest else None


def write(path: Path, kernels: bytes) -> bool:
    """Write the kernels to `path` atomically; returns False if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(hashlib.sha256(kernels).digest() + kernels)
    except OSError:
        return False
    return True


def _file(folder: str, name: str) -> Path | None:
    directory = cache_directory()
    return None if directory is None else directory / folder / f"{name}.bin"
