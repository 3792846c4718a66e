"""Commands that are killed, or whose disk is full: export, calibrate. Counts what is left behind.

Each run is a fork of this process, which has imported everything already: a kill may then come at
any moment of the work itself, and a run takes a second or two instead of ten.
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

import pytest

import calib.layers.calibrate  # noqa: F401  (what the commands would import when they run)
import exporter.export
import runtime.backends.onnxruntime_cpu  # noqa: F401
from exporter.bundle.staging import PARTIAL
from exporter.quantization.calibration_table import CalibrationTable
from runtime.bundle.open import open_bundle
from tests.reliability.guard import check_message
from tests.reliability.trial import Trial
from tests.support.make_checkpoint import tiny_spec, write_checkpoint

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 40
LIMIT = 120  # seconds of one run


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command that makes a directory called `out`, and what opens that directory."""

    words: tuple[str, ...]
    open: Callable[[Path], object]
    kept: Callable[[str], bool]  # names that a killed or failed run may leave beside it


def inputs(folder: Path) -> None:
    """A checkpoint and a text for the commands, named as in their words."""
    write_checkpoint(folder / "checkpoint", tiny_spec(window=8))
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")


def run(command: Command, folder: Path, out: Path) -> "Run":
    """Start a command in a fork, its standard error in a file."""
    sys.stdout.flush()
    errors = folder / "errors"
    errors.write_bytes(b"")
    words = ["mistralc", *(word.format(folder=folder, out=out) for word in command.words)]
    child = os.fork()
    if child == 0:
        _be_the_command(words, errors)
    return Run(child, errors, time.monotonic())


@dataclass(frozen=True, slots=True)
class Run:
    """A fork at work."""

    pid: int
    errors: Path
    began: float

    def ended(self) -> tuple[int, str]:
        """Wait for the end; exit status (negative: the signal) and standard error."""
        while time.monotonic() < self.began + LIMIT:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                return code, self.errors.read_text(encoding="utf-8")
            time.sleep(0.01)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"a run took more than {LIMIT} seconds")


def _be_the_command(words: list[str], errors: Path) -> None:
    """Never returns: this process is the command now."""
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
            except BaseException as error:  # a traceback is what the trial looks for
                print(f"Traceback: {error!r}", file=file)
    finally:
        os._exit(code if isinstance(code, int) else 1)


def killed(command: Command, folder: Path, draw: random.Random) -> str:
    """Kill a run at a random moment, look at what is there, run it again to the end."""
    place = folder / "place"
    place.mkdir()
    out = place / "out"
    try:
        whole = _whole(command, folder)
        running = run(command, folder, out)
        time.sleep(draw.random() * whole)
        with contextlib.suppress(ProcessLookupError):
            os.kill(running.pid, signal.SIGKILL)
        code, errors = running.ended()
        assert code in (0, -signal.SIGKILL), f"status {code}: {errors}"
        _check_left(command, place, out)
        if not out.exists():
            code, errors = run(command, folder, out).ended()
            assert code == 0, f"the run after the kill failed: {errors}"
        command.open(out)
        assert [path.name for path in place.iterdir()] == ["out"], "something was left behind"
        assert _digest(out) == _digests[command.words], "after a kill other bytes came out"
    finally:
        shutil.rmtree(place)
    return "completed"


_durations: dict[tuple[str, ...], float] = {}
_digests: dict[tuple[str, ...], str] = {}


def _whole(command: Command, folder: Path) -> float:
    """Seconds of a run that nobody disturbs, measured once; its result is what others must be."""
    if command.words not in _durations:
        out = folder / "undisturbed"
        began = time.monotonic()
        code, errors = run(command, folder, out).ended()
        assert code == 0, errors
        _durations[command.words] = time.monotonic() - began
        _digests[command.words] = _digest(out)
    return _durations[command.words]


def full_disk(command: Command, folder: Path, draw: random.Random) -> str:
    """Run a command on a disk of a random size: it completes, or says that there is no room."""
    with small_disk(folder / "disk", draw) as place:
        out = place / "out"
        with pytest.MonkeyPatch.context() as patch:  # as if the space went after it was looked at
            patch.setattr(exporter.export, "require_host", lambda _plan, _destination: None)
            code, errors = run(command, folder, out).ended()
        if code == 0:
            command.open(out)
            return "completed"
        assert code == 1, f"status {code}: {errors}"
        assert errors.startswith("mistralc: "), errors
        check_message(errors.removesuffix("\n"))
        assert not out.exists(), "half of it was left"
        _check_left(command, place, out)
    return "refused"


@contextmanager
def small_disk(place: Path, draw: random.Random) -> Iterator[Path]:
    """A file system of 4 kB to 1.5 MB; without the right to mount one, a limit on files' sizes."""
    place.mkdir(exist_ok=True)
    size = 4 * int(4 ** (draw.random() * 4.25))  # kB: as many small ones as large ones
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


def _check_left(command: Command, place: Path, out: Path) -> None:
    """What has the result's name is a whole result; what else there is, is known by its name."""
    if out.exists():
        command.open(out)
    strange = [path.name for path in place.iterdir() if path != out and not command.kept(path.name)]
    assert not strange, f"left behind: {strange}"


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


EXPORT = Command(
    words=("export", "{folder}/checkpoint", "-o", "{out}", "--quiet"),
    open=open_bundle,
    kept=lambda name: name.startswith(PARTIAL),
)
CALIBRATE = Command(
    words=("calibrate", "{folder}/checkpoint", "-o", "{out}", "--precision", "int4wo", "--text",
           "{folder}/text.txt", "--length", "32", "--samples", "8", "--quiet"),
    open=CalibrationTable.read,
    kept=lambda name: name.startswith(PARTIAL) or name == "out.partial",
)  # fmt: skip

TRIALS = (
    Trial(name="export, killed", prepare=inputs, hurt=partial(killed, EXPORT)),
    Trial(name="calibrate, killed", prepare=inputs, hurt=partial(killed, CALIBRATE)),
    Trial(name="export, disk full", prepare=inputs, hurt=partial(full_disk, EXPORT)),
    Trial(name="calibrate, disk full", prepare=inputs, hurt=partial(full_disk, CALIBRATE)),
)
