"""Refuse a build that this host cannot hold, before anything is written."""

import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from exporter.decide import NOTHING_KNOWN, decide
from exporter.estimate.host import HostNeeds, host_needs
from exporter.options import BuildOptions
from exporter.quantization.policy import WeightFacts
from graphs.build import Build
from graphs.errors import MistralcError, UsageError
from graphs.precisions import PRECISIONS
from runtime.system.host import memory_available


def require_host(
    build: Build, destination: Path, options: BuildOptions, facts: WeightFacts = NOTHING_KNOWN
) -> None:
    """Raise MistralcError unless this host has the memory and, at `destination`, the disk.

    The message names the precisions of the target that fit, with the other `options` as they are.
    """
    needed = host_needs(build, facts)
    existing = next(path for path in destination.absolute().parents if path.exists())
    free, disk = shutil.disk_usage(existing).free, needed.disk_bytes
    what = f"{build.precision.name} for {build.target.name}"
    if free < disk:
        raise MistralcError(
            f"Exporting this model in {what} needs {disk:,} bytes of disk while it builds, and "
            f"{existing} has {free:,} bytes free. Free some space, choose a directory on another "
            f"disk, or {_smaller(build, options, facts, free, 'disk_bytes')}"
        )
    available, step = memory_available(), needed.largest
    if available is not None and available < step.memory_bytes:
        raise MistralcError(
            f"Exporting this model in {what} needs about {step.memory_bytes:,} bytes of memory "
            f"(for the step: {step.name}), and {available:,} bytes are available here. Stop other "
            "programs, export on a host with more memory, or "
            f"{_smaller(build, options, facts, available, 'memory_bytes')}"
        )


def _smaller(build: Build, options: BuildOptions, facts: WeightFacts, limit: int, what: str) -> str:
    """Say which other precisions of the target need at most `limit` bytes, the largest first."""
    found = [(getattr(needed, what), name) for name, needed in _others(build, options, facts)]
    fitting = sorted((pair for pair in found if pair[0] <= limit), reverse=True)
    if fitting:
        names = ", ".join(f"{name} ({size:,} bytes)" for size, name in fitting)
        return f"use a --precision that fits: {names}."
    if found:
        size, name = min(found)
        return f"use a smaller model: {name} needs the least of the others, {size:,} bytes."
    return "use a smaller model."


def _others(
    build: Build, options: BuildOptions, facts: WeightFacts
) -> Iterator[tuple[str, HostNeeds]]:
    """What the target's other precisions need, those that need no calibration."""
    for name in build.target.activations:
        if name == build.precision.name or PRECISIONS[name].needs_calibration:
            continue
        with suppress(UsageError):  # an option that the precision does not have
            other = decide(build.spec, build.target, replace(options, precision=name), facts)
            yield name, host_needs(other, facts)
