"""Kill export and calibrate, or fill their disk, and check what they leave behind.

Each run is a fork of this process, which has already imported everything. A kill therefore hits the
work itself, not the imports, and a run takes one to two seconds instead of ten.
"""

import contextlib
import hashlib
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest

import calib.layers.calibrate  # noqa: F401  (the commands import it when they run)
import exporter.export
import runtime.backends.onnxruntime_cpu  # noqa: F401
from exporter.bundle.staging import PARTIAL
from exporter.quantization.calibration_table import CalibrationTable
from runtime.bundle.open import open_bundle
from tests.reliability.harness.guard import check_message
from tests.reliability.harness.trial import Trial
from tests.support.make_checkpoint import tiny_spec, write_checkpoint

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 40
LIMIT = 120  # seconds per run


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command that creates the directory `out`; `open` validates that directory."""

    words: tuple[str, ...]
    open: Callable[[Path], object]
    may_remain: Callable[[str], bool]  # names that a killed or failed run may leave beside `out`


def inputs(folder: Path) -> None:
    """Write the checkpoint and the text that the commands read."""
    write_checkpoint(folder / "checkpoint", tiny_spec(window=8))
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")


def run(command: Command, folder: Path, out: Path) -> "Run":
    """Start a command in a fork; its standard error goes to a file."""
    sys.stdout.flush()
    errors = folder / "errors"
    errors.write_bytes(b"")
    words = ["mistralc", *(word.format(folder=folder, out=out) for word in command.words)]
    child = os.fork()
    if child == 0:
        _run_command(words, errors)
    return Run(child, errors, time.monotonic())


@dataclass(frozen=True, slots=True)
class Run:
    """A running fork."""

    pid: int
    errors: Path
    started: float

    def wait(self) -> tuple[int, str]:
        """Wait for the end; return exit status (negative: the signal) and standard error."""
        while time.monotonic() < self.started + LIMIT:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                return code, self.errors.read_text(encoding="utf-8")
            time.sleep(0.01)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"a run took more than {LIMIT} seconds")


def _run_command(words: list[str], errors: Path) -> NoReturn:
    """Run the command in this process, then exit."""
    import mistralc

    code: object = 1
    sys.argv = words
    try:
        with (
            errors.open("w", encoding="utf-8") as file,
            contextlib.redirect_stderr(file),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            try:
                mistralc.main()
                code = 0
            except SystemExit as ended:
                code = ended.code
            except BaseException as error:  # the trial looks for tracebacks
                print(f"Traceback: {error!r}", file=file)
    finally:
        os._exit(code if isinstance(code, int) else 1)


def killed(command: Command, folder: Path, draw: random.Random) -> str:
    """Kill a run at a random moment, check what it left, then run it again to completion."""
    place = folder / "place"
    place.mkdir()
    out = place / "out"
    try:
        duration = _undisturbed_seconds(command, folder)
        running = run(command, folder, out)
        time.sleep(draw.random() * duration)
        with contextlib.suppress(ProcessLookupError):
            os.kill(running.pid, signal.SIGKILL)
        code, errors = running.wait()
        assert code in (0, -signal.SIGKILL), f"status {code}: {errors}"
        _check_leftovers(command, place, out)
        if not out.exists():
            code, errors = run(command, folder, out).wait()
            assert code == 0, f"the run after the kill failed: {errors}"
        command.open(out)
        assert [path.name for path in place.iterdir()] == ["out"], (
            "the completed run left other files behind"
        )
        assert _digest(out) == _digests[command.words], (
            "the result differs from that of an undisturbed run"
        )
    finally:
        shutil.rmtree(place)
    return "completed"


_durations: dict[tuple[str, ...], float] = {}
_digests: dict[tuple[str, ...], str] = {}


def _undisturbed_seconds(command: Command, folder: Path) -> float:
    """Duration of an undisturbed run, measured once; its result is the reference for the others."""
    if command.words not in _durations:
        out = folder / "undisturbed"
        started = time.monotonic()
        code, errors = run(command, folder, out).wait()
        assert code == 0, errors
        _durations[command.words] = time.monotonic() - started
        _digests[command.words] = _digest(out)
    return _durations[command.words]


def full_disk(command: Command, folder: Path, draw: random.Random) -> str:
    """Run a command on a disk of random size: it completes or reports that the disk is full."""
    with small_disk(folder / "disk", draw) as place:
        out = place / "out"
        with pytest.MonkeyPatch.context() as patch:  # as if the disk filled up after the check
            patch.setattr(exporter.export, "require_host", lambda *_arguments: None)
            code, errors = run(command, folder, out).wait()
        if code == 0:
            command.open(out)
            return "completed"
        assert code == 1, f"status {code}: {errors}"
        assert errors.startswith("mistralc: "), errors
        check_message(errors.removesuffix("\n"))
        assert not out.exists(), "an incomplete result has the final name"
        _check_leftovers(command, place, out)
    return "refused"


@contextmanager
def small_disk(place: Path, draw: random.Random) -> Iterator[Path]:
    """Mount a file system of 4 kB to 1.5 MB; without permission, limit file sizes instead."""
    place.mkdir(exist_ok=True)
    size = 4 * int(4 ** (draw.random() * 4.25))  # kB, log-uniform
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(place)]
    if (
        os.geteuid() == 0
        and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    ):
        try:
            yield place
        finally:
            subprocess.run(["umount", str(place)], check=True)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size * 1024, hard))
    try:
        yield place
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        shutil.rmtree(place)


def _check_leftovers(command: Command, place: Path, out: Path) -> None:
    """Assert that `out` is absent or complete, and that only permitted names lie beside it."""
    if out.exists():
        command.open(out)
    others = (path.name for path in place.iterdir() if path != out)
    unexpected = [name for name in others if not command.may_remain(name)]
    assert not unexpected, f"left behind: {unexpected}"


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


EXPORT = Command(
    words=("export", "{folder}/checkpoint", "-o", "{out}", "--quiet"),
    open=open_bundle,
    may_remain=lambda name: name.startswith(PARTIAL),
)
CALIBRATE = Command(
    words=("calibrate", "{folder}/checkpoint", "-o", "{out}", "--precision", "int4wo", "--text",
           "{folder}/text.txt", "--length", "32", "--samples", "8", "--quiet"),
    open=CalibrationTable.read,
    may_remain=lambda name: name.startswith(PARTIAL) or name == "out.partial",
)  # fmt: skip

TRIALS = (
    Trial(name="export, killed", prepare=inputs, run_once=partial(killed, EXPORT)),
    Trial(name="calibrate, killed", prepare=inputs, run_once=partial(killed, CALIBRATE)),
    Trial(name="export, disk full", prepare=inputs, run_once=partial(full_disk, EXPORT)),
    Trial(name="calibrate, disk full", prepare=inputs, run_once=partial(full_disk, CALIBRATE)),
)
