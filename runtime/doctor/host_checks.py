"""Check that this host can run mistralc, and suggest remedies. Prints nothing.

Each check is a function from facts to `Check` values, so that every verdict can be tested without
the hardware in question. Loads no model, and imports neither torch nor onnx.
"""

import importlib
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from graphs.targets import DEFAULT_TARGET
from runtime.bundle.open import cache_file
from runtime.doctor.bundle_checks import broken, check_bundle
from runtime.doctor.finding import Check, failed, ok, warning
from runtime.system import host
from runtime.system.host import BACKENDS, REQUIRED, Cuda, Library, find_library

OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 13)
MIN_CACHE_BYTES = 64 << 20  # free disk that the cache of hashes needs


def examine(bundle: Path | None = None, require_signature: Path | None = None) -> list[Check]:
    """Run every check of this host, and of a bundle if one is given.

    `require_signature` is passed to `open_bundle`.
    """
    cuda = host.cuda()
    libraries = {
        name: find_library(name, packages, load=True) for name, packages in BACKENDS.items()
    }
    providers = _providers(libraries["onnxruntime"])
    checks = [
        check_python(sys.version_info[:3]),
        ok(
            "platform", f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}"
        ),
        check_memory(host.memory_total(), host.memory_available()),
        check_cache(cache_file()),
        *(check_required(find_library(name, (name,), load=False)) for name in REQUIRED),
        *check_backends(libraries, providers),
        _torch(find_library("torch", ("torch",), load=False)),
        *check_cuda(cuda),
    ]
    if bundle is not None:
        checks += check_bundle(bundle, libraries, providers, cuda, require_signature)
    return checks


def check_python(version: tuple[int, ...]) -> Check:
    """Compare Python with the versions that mistralc is tested on."""
    found = ".".join(map(str, version))
    if OLDEST_PYTHON <= version[:2] <= NEWEST_PYTHON:
        return ok("Python", found)
    oldest, newest = (".".join(map(str, each)) for each in (OLDEST_PYTHON, NEWEST_PYTHON))
    return warning(
        "Python",
        f"{found}; mistralc is tested on {oldest} to {newest}",
        f"python{newest} -m venv .venv",
    )


def check_memory(total: int | None, available: int | None) -> Check:
    """Report memory; `check_room` compares it with what a bundle needs."""
    if total is None or available is None:
        return ok("memory", "unknown: not in /proc/meminfo")
    return ok("memory", f"{total / 1e9:,.1f} GB, {available / 1e9:,.1f} GB available")


def check_cache(path: Path | None) -> Check:
    """Check the free disk for the cache of file hashes."""
    if path is None:
        return warning(
            "cache",
            "this user has no home directory, so every start hashes the whole bundle",
            "export XDG_CACHE_HOME=/var/cache",
        )
    existing = next(parent for parent in path.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    home = os.path.expanduser("~")  # noqa: PTH111  (Path.home() raises if there is none)
    shown = str(path.parent).replace(home, "~", 1)
    found = f"{shown}, {free / 1e9:,.1f} GB free"
    if free < MIN_CACHE_BYTES:
        return warning("cache", found, "export XDG_CACHE_HOME=DIRECTORY_ON_ANOTHER_DISK")
    return ok("cache", found)


def check_required(library: Library) -> Check:
    """Check one library that every bundle needs."""
    if library.version is None:
        return failed(library.name, "not installed", f"pip install {library.name}")
    return ok(library.name, library.version)


def check_backends(libraries: Mapping[str, Library], providers: tuple[str, ...]) -> list[Check]:
    """Report each backend; it is a warning if none is installed."""
    checks = []
    for name, library in libraries.items():
        if library.version is None:
            checks.append(ok(name, "not installed"))
        elif library.problem is not None:
            checks.append(broken(library))
        else:
            with_providers = f", {' '.join(providers)}" if name == "onnxruntime" else ""
            checks.append(ok(name, f"{library.version}{with_providers}"))
    if not any(library.version for library in libraries.values()):
        found = "none is installed, so no bundle can run here"
        install = f"pip install 'mistralc[{DEFAULT_TARGET}]'"
        checks.append(warning("backends", found, install))
    return checks


def check_cuda(cuda: Cuda) -> list[Check]:
    """Report the NVIDIA driver and its GPUs; a host without them is ok."""
    if cuda.problem is not None and cuda.version is None:
        return [ok("GPU", f"none: {cuda.problem}")]
    newest = ".".join(map(str, cuda.version)) if cuda.version else "?"
    driver = ok("NVIDIA driver", f"{cuda.driver or 'version unknown'}, CUDA up to {newest}")
    if cuda.problem is not None:
        return [driver, warning("GPU", cuda.problem, "nvidia-smi")]
    return [
        driver,
        *(
            ok(
                f"GPU {i}",
                f"{device.name}, {device.memory_bytes / 1e9:,.1f} GB, "
                f"compute capability {device.compute_capability}",
            )
            for i, device in enumerate(cuda.devices)
        ),
    ]


def _providers(library: Library) -> tuple[str, ...]:
    if library.version is None or library.problem is not None:
        return ()
    return tuple(importlib.import_module("onnxruntime").get_available_providers())


def _torch(library: Library) -> Check:
    return ok("torch", library.version or "not installed; only building bundles needs it")
