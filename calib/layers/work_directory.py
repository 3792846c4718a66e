"""The state of a calibration between layers, on disk. Knows no method.

A working directory holds, for a plan that says exactly what is being made of what, one file of
decisions for each finished layer, and the samples as they left the last one. Files appear under
their names when they are complete, the layer's decisions last: wherever a process is killed, the
next one goes on after the last layer that has them. A directory of another plan is begun anew.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from graphs.errors import MistralcError

PLAN, LOCK = "plan.json", "lock"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What was decided for one layer: tensors of the table, and measurements for the report."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """An opened working directory; `opened` makes one."""

    directory: Path

    def finished(self) -> int:
        """How many layers, counted from the first, are decided."""
        count = 0
        while self._layer(count).exists():
            count += 1
        return count

    def layer(self, index: int) -> Layer:
        """Read the decisions of a finished layer."""
        try:
            with safe_open(self._layer(index), "pt") as file:
                facts = json.loads(file.metadata()["facts"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return Layer(tensors=tensors, facts=dict(facts))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise MistralcError(
                f"{self._layer(index)} was changed after a stopped calibration wrote it "
                f"({error!s:.200}), so it cannot go on from there. Delete {self.directory} and run "
                "the same command again."
            ) from error

    def samples(self, stream: str, index: int) -> Path:
        """File of a stream's samples as they enter layer `index`."""
        return self.directory / f"{stream}-{index:05}.bin"

    def scratch(self, name: str) -> Path:
        """A file that no later process needs."""
        return self.directory / f"{name}.tmp"

    def finish(self, index: int, layer: Layer, streams: Mapping[str, Path]) -> None:
        """Record a layer: its samples, which lie in files of any name, then what was decided."""
        for stream, path in streams.items():
            _flush(path)
            path.rename(self.samples(stream, index + 1))
        staged = self.scratch("layer")
        tensors = {name: layer.tensors[name].contiguous() for name in sorted(layer.tensors)}
        save_file(tensors, staged, {"facts": json.dumps(dict(layer.facts), sort_keys=True)})
        _flush(staged)
        staged.rename(self._layer(index))
        _flush(self.directory)
        for stream in streams:
            self.samples(stream, index).unlink(missing_ok=True)

    def remembered(self, name: str, make: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Numbers that were made here before, else make them and keep them."""
        path = self.directory / f"{name}.json"
        if not path.exists():
            staged = self.scratch(name)
            staged.write_text(json.dumps(make()), encoding="utf-8")
            staged.rename(path)
        found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def _layer(self, index: int) -> Path:
        return self.directory / f"layer-{index:05}.safetensors"


@contextmanager
def opened(directory: Path, plan: Mapping[str, Any]) -> Iterator[Work]:
    """Open the working directory for `plan`, plain data, keeping other processes out.

    What another plan left there is deleted. Raises MistralcError where another process works
    there, or the directory is something else.
    """
    text = json.dumps(plan, indent=1, sort_keys=True) + "\n"
    if directory.exists() and not (directory / LOCK).exists() and any(directory.iterdir()):
        raise MistralcError(
            f"{directory} exists and was not made by calibration, which keeps its work there. "
            "Move it away, or choose another name for the table."
        )
    with _explained(directory), _locked(directory):
        found = directory / PLAN
        if not found.exists() or found.read_text(encoding="utf-8") != text:
            for path in directory.iterdir():
                if path.name != LOCK:
                    path.unlink()
            found.write_text(text, encoding="utf-8")
        yield Work(directory=directory)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MistralcError(
                f"Another process is calibrating in {directory}. Wait for it, or choose another "
                "name for the table."
            ) from error
        yield


@contextmanager
def _explained(directory: Path) -> Iterator[None]:
    """Turn what the disk refuses, a full one above all, into an error of ours."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise MistralcError(
            f"The work of the calibration could not be written to {directory} ({error!s:.200}). "
            "Free some space there, or choose a place on another disk; the same command goes on "
            "after the last finished layer."
        ) from error


def remove(work: Work) -> None:
    """Delete the working directory, once the table is written."""
    shutil.rmtree(work.directory, ignore_errors=True)


def _flush(path: Path) -> None:
    """Have the kernel write a file or directory out before it is relied on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
