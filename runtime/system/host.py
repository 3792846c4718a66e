"""What this host has: memory, NVIDIA GPUs, libraries. Knows nothing about bundles or verdicts.

Reads Linux's own files and calls the CUDA driver's C interface, so that it can report what is
missing without any package installed.
"""

import ctypes
import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphs.targets import TARGETS

REQUIRED = ("numpy", "tokenizers", "jinja2")
"""Packages that every bundle needs, whatever its backend."""

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
DRIVER_VERSION = Path("/sys/module/nvidia/version")

BACKENDS: Mapping[str, tuple[str, ...]] = {
    target.backend_module: target.distributions for target in reversed(list(TARGETS.values()))
}
"""The packages that provide each backend, by import name."""

# cuda.h: CUdevice_attribute
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One GPU, as the driver describes it."""

    name: str
    compute_capability: str
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cuda:
    """The NVIDIA driver and its GPUs. If there are none, `problem` says why.

    `version` is the newest CUDA that the driver supports, such as (13, 0). `driver` is the driver's
    own version; None if the kernel does not report it.
    """

    version: tuple[int, int] | None = None
    driver: str | None = None
    devices: tuple[Device, ...] = ()
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """A Python package by import name. `problem` says why an installed one cannot be imported.

    `version` is None if the package is not installed, and "?" if its version is unknown.
    """

    name: str
    version: str | None
    distribution: str | None = None  # the name under which it was installed
    problem: str | None = None


def memory_total() -> int | None:
    """Return the bytes of this host's memory; None if /proc does not report it."""
    return _proc_bytes("meminfo", "MemTotal")


def memory_available() -> int | None:
    """Return the bytes that can still be allocated; None if unknown.

    That is the kernel's estimate, or what is left of a container's limit if that is less.
    """
    values = _proc_bytes("meminfo", "MemAvailable"), _cgroup_left()
    return min((value for value in values if value is not None), default=None)


def peak_memory_bytes() -> int | None:
    """Return the peak resident memory of this process; None if the kernel does not report it.

    `getrusage` is of no use: its peak includes the process that started this one.
    """
    return _proc_bytes("self/status", "VmHWM")


def huge_page_bytes() -> int | None:
    """Return this process's memory on huge pages; None if the kernel does not report it."""
    return _proc_bytes("self/smaps_rollup", "AnonHugePages")


def cuda(load: Callable[[str], Any] = ctypes.CDLL) -> Cuda:
    """Ask the CUDA driver library for its version and GPUs. Initializes CUDA in this process."""
    try:
        library = load("libcuda.so.1")
    except OSError:
        return Cuda(problem="no NVIDIA driver is installed (libcuda.so.1 is missing)")
    number = ctypes.c_int()
    version = None
    if library.cuDriverGetVersion(ctypes.byref(number)) == 0:
        version = number.value // 1000, number.value % 1000 // 10
    driver = None
    with suppress(OSError):
        driver = DRIVER_VERSION.read_text(encoding="ascii").strip()
    code = library.cuInit(0)
    if code == 0:
        code = library.cuDeviceGetCount(ctypes.byref(number))
    if code != 0 or number.value == 0:
        problem = f"the NVIDIA driver cannot be initialized (CUDA error {code})"
        if code in (0, _NO_DEVICE):
            problem = "the NVIDIA driver is installed but finds no GPU"
        return Cuda(version=version, driver=driver, problem=problem)
    devices = tuple(_device(library, index) for index in range(number.value))
    return Cuda(version=version, driver=driver, devices=devices)


def find_library(name: str, distributions: tuple[str, ...], *, load: bool) -> Library:
    """Look a library up by import name and by the packages that may provide it.

    With `load` it is imported, which reveals a broken installation; otherwise it is only located.
    """
    provider = next((each for each in distributions if _version(each)), None)
    version = (_version(provider) if provider else None) or "?"
    missing = Library(name=name, version=None)
    try:
        if load:
            importlib.import_module(name)
        elif importlib.util.find_spec(name) is None:
            return missing
    except ModuleNotFoundError as error:
        if error.name == name:
            return missing
        return Library(name=name, version=version, distribution=provider, problem=_line(error))
    except Exception as error:  # a library whose own libraries are missing may raise anything
        return Library(name=name, version=version, distribution=provider, problem=_line(error))
    return Library(name=name, version=version, distribution=provider)


def release(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version, for comparison: "1.31.1rc1" gives (1, 31, 1)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def _proc_bytes(file: str, field: str) -> int | None:
    """Return a field of a /proc file, which is in kilobytes, as bytes; None if it is missing."""
    with suppress(OSError, ValueError):
        for line in (PROC / file).read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return int(value.split()[0]) * 1024
    return None


def _cgroup_left() -> int | None:
    """Return the bytes left below a container's limit (cgroup 2), counting page cache as free."""
    with suppress(OSError, ValueError, KeyError):
        limit = (CGROUP / "memory.max").read_text(encoding="ascii").strip()
        if limit == "max":
            return None
        used = int((CGROUP / "memory.current").read_text(encoding="ascii"))
        lines = (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
        stat = {name: int(value) for name, value in (line.split() for line in lines)}
        return max(0, int(limit) - used + stat["inactive_file"] + stat["active_file"])
    return None


def _device(library: Any, index: int) -> Device:
    handle, number, size = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    library.cuDeviceGet(ctypes.byref(handle), index)
    library.cuDeviceGetName(name, len(name), handle)
    library.cuDeviceTotalMem_v2(ctypes.byref(size), handle)
    capability = []
    for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
        library.cuDeviceGetAttribute(ctypes.byref(number), attribute, handle)
        capability.append(str(number.value))
    return Device(
        name=name.value.decode(errors="replace"),
        compute_capability=".".join(capability),
        memory_bytes=size.value,
    )


def _version(distribution: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(distribution)
    return None


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]
