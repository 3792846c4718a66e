"""Keep the state of a calibration on disk between layers. Knows no method.

A work directory belongs to one set of inputs: checkpoint, samples, options, versions. It holds one
result file per finished layer, and the samples as they left the last finished layer. A file gets
its final name when it is complete, the layer's result last. So wherever a process is killed, the
next one resumes after the last layer with a result. If the inputs differ, work starts again.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from graphs.errors import MistralcError

INPUTS, LOCK = "inputs.json", "lock"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerResult:
    """Result for one layer: tensors of the table, and measurements for the report."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkDirectory:
    """An open work directory; see `open_work_directory`."""

    directory: Path

    def finished(self) -> int:
        """Count the finished layers, from the first."""
        count = 0
        while self._layer(count).exists():
            count += 1
        return count

    def layer(self, index: int) -> LayerResult:
        """Read the result of a finished layer. Raises MistralcError if its file is damaged."""
        try:
            with safe_open(self._layer(index), "pt") as file:
                facts = json.loads(file.metadata()["facts"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return LayerResult(tensors=tensors, facts=dict(facts))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise MistralcError(
                f"{self._layer(index)} was changed after a stopped calibration wrote it "
                f"({error!s:.200}), so calibration cannot resume from it. Delete {self.directory} "
                "and run the same command again."
            ) from error

    def samples(self, stream: str, index: int) -> Path:
        """Return the file of a stream's samples as they enter layer `index`."""
        return self.directory / f"{stream}-{index:05}.bin"

    def scratch(self, name: str) -> Path:
        """Return the path of a temporary file, which no later process needs."""
        return self.directory / f"{name}.tmp"

    def finish(self, index: int, layer: LayerResult, streams: Mapping[str, Path]) -> None:
        """Record a finished layer: first its samples, from the given files, then its result."""
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

    def cached(self, name: str, make: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Return the numbers stored under `name`, or make and store them."""
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
def open_work_directory(directory: Path, inputs: Mapping[str, Any]) -> Iterator[WorkDirectory]:
    """Open the work directory for `inputs`, plain data, and lock it against other processes.

    The work of other inputs is deleted. Raises MistralcError if another process works there, if the
    directory was not made by calibration, or if it cannot be written.
    """
    text = json.dumps(inputs, indent=1, sort_keys=True) + "\n"
    if directory.exists() and not (directory / LOCK).exists() and any(directory.iterdir()):
        raise MistralcError(
            f"{directory} exists and was not made by calibration, which needs this name for its "
            "unfinished work. Move it away, or choose another name for the table."
        )
    with _explained(directory), _locked(directory):
        found = directory / INPUTS
        if not found.exists() or found.read_text(encoding="utf-8") != text:
            for path in directory.iterdir():
                if path.name != LOCK:
                    path.unlink()
            found.write_text(text, encoding="utf-8")
        yield WorkDirectory(directory=directory)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MistralcError(
                f"Another process is calibrating in {directory}. Wait until it ends, or choose "
                "another name for the table."
            ) from error
        yield


@contextmanager
def _explained(directory: Path) -> Iterator[None]:
    """Report a failed write, most likely because the disk is full, as a MistralcError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise MistralcError(
            f"The work of the calibration could not be written to {directory} ({error!s:.200}). "
            "Free some space there, or write the table to another disk. The same command resumes "
            "after the last finished layer."
        ) from error


def _flush(path: Path) -> None:
    """Flush a file or directory to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
