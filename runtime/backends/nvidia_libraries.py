"""Load NVIDIA's libraries from Python packages, wherever these are installed.

ONNX Runtime looks for them only in the site-packages that it lies in itself. They are often in
another: those that PyTorch brought, or those of the system beside a virtual environment. All parts
of the namespace package `nvidia` are searched here, in the order of `sys.path`. A library that is
loaded is found by its name by whatever needs it later.
"""

import ctypes
import importlib.util
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

NEEDED = (
    "libcudart.so.{cuda}", "libnvrtc.so.{cuda}", "libcublasLt.so.{cuda}", "libcublas.so.{cuda}",
    "libcurand.so.*", "libcufft.so.*", "libcudnn.so.9",
)  # fmt: skip
"""What ONNX Runtime's CUDA provider links to, each after those that it needs itself. cuDNN finds
its own parts beside it."""


def load_nvidia_libraries(cuda_major: str) -> list[Path]:
    """Load the libraries of CUDA `cuda_major`, such as "13", and cuDNN; returns those loaded.

    A library that the process has already is left as it is, and one that fails to load is left to
    ONNX Runtime, whose error names it.
    """
    loaded = []
    for path in _needed(packaged_folders(), cuda_major):
        if not _is_loaded(path.name):
            with suppress(OSError):
                ctypes.CDLL(str(path))
                loaded.append(path)
    return loaded


def packaged_folders() -> list[Path]:
    """The folders of libraries of all packages below `nvidia`, nearest first."""
    found = importlib.util.find_spec("nvidia")
    roots = [] if found is None else found.submodule_search_locations or []
    return [folder for root in roots for folder in sorted(Path(root).glob("*/lib"))]


def _needed(folders: Iterable[Path], cuda_major: str) -> Iterator[Path]:
    folders = list(folders)
    for pattern in NEEDED:
        for folder in folders:
            yield from sorted(folder.glob(pattern.format(cuda=cuda_major)))


def _is_loaded(name: str) -> bool:
    try:
        ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return False
    return True
