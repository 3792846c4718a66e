"""An export that fails midway leaves nothing: full disk, kill, Ctrl-C, wrong results."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exporter import export as exporting
from exporter.bundle import staging as writing
from runtime.bundle.open import open_bundle
from tests.conftest import Command
from tests.support.commands import refused
from tests.support.tiny import traced

ROOT = Path(__file__).resolve().parents[3]


def test_a_disk_that_is_too_small_is_refused_before_tracing(
    mistralc: Command,
    monkeypatch: pytest.MonkeyPatch,
    sliding_checkpoint: Path,
    tmpfs: Callable[[int], Path],
) -> None:
    def never(*_arguments: object) -> None:
        pytest.fail("the decoder was traced although the disk is too small")

    monkeypatch.setattr(exporting, "trace", never)
    disk = tmpfs(300)
    ended = mistralc("export", sliding_checkpoint, "-o", disk / "bundle")
    refused(ended, str(disk), "bytes free", "another disk")
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize(
    ("kib", "during"), [(200, "weights.safetensors"), (412, "model.onnx"), (432, "tokenizer.json")]
)
def test_an_export_that_fills_the_disk_leaves_nothing(
    mistralc: Command,
    monkeypatch: pytest.MonkeyPatch,
    sliding_checkpoint: Path,
    tmpfs: Callable[[int], Path],
    kib: int,
    during: str,
) -> None:
    monkeypatch.setattr(exporting, "trace", traced)
    # As if another program took the space after the check.
    monkeypatch.setattr(exporting, "require_host", lambda *_arguments: None)
    written: list[set[str]] = []
    explained = writing._explained

    def check_errno(error: OSError, destination: Path) -> Exception:
        assert error.errno == errno.ENOSPC
        return explained(error, destination)

    real = shutil.rmtree

    def record_files(path: Path, **arguments: Any) -> None:
        written.append({file.name for file in Path(path).iterdir()})
        real(path, **arguments)

    monkeypatch.setattr(writing, "_explained", check_errno)
    monkeypatch.setattr(writing.shutil, "rmtree", record_files)
    disk = tmpfs(kib)
    ended = mistralc("export", sliding_checkpoint, "-o", disk / "made" / "bundle")
    refused(ended, "The disk was full", str(disk / "made" / "bundle"), "Free some space")
    assert during in written[-1], "the disk was full before or after the intended file"
    assert list(disk.iterdir()) == []


def test_a_killed_export_leaves_nothing_that_looks_like_a_bundle(
    mistralc: Command, sliding_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    # The child stops itself while it writes the weights, so the kill cannot come too late.
    code = """
import os, signal, sys
from exporter.bundle import weights_file
write = weights_file._write_weight
def stopping(checkpoint, recipe, name, layout, file):
    if "layers.1" in name:
        os.kill(os.getpid(), signal.SIGSTOP)
    yield from write(checkpoint, recipe, name, layout, file)
weights_file._write_weight = stopping
import mistralc
mistralc.main()
"""
    command = [sys.executable, "-c", code, "export", sliding_checkpoint, "-o", out / "bundle"]
    child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    wait_for_stop(child)
    (staging,) = out.iterdir()
    assert staging.name.startswith(writing.PARTIAL)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert [path.name for path in out.iterdir()] == [staging.name], "no bundle may remain"

    monkeypatch.setattr(exporting, "trace", traced)
    ended = mistralc("export", sliding_checkpoint, "-o", out / "another")
    assert ended.code == 0, ended.err
    assert [path.name for path in out.iterdir()] == ["another"], "leftover not removed"
    open_bundle(out / "another")


def wait_for_stop(child: subprocess.Popen[bytes]) -> None:
    """Wait until a child process has stopped itself with SIGSTOP."""
    deadline = time.monotonic() + 120  # importing torch takes long on a busy host
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child.pid, os.WUNTRACED | os.WNOHANG)
        if pid and os.WIFSTOPPED(status):
            return
        assert pid == 0, f"the export ended before it could be killed: {status}"
        time.sleep(0.02)
    child.kill()
    pytest.fail("the export did not reach the weights within two minutes")


def test_an_export_stopped_by_ctrl_c_leaves_nothing(
    mistralc: Command,
    monkeypatch: pytest.MonkeyPatch,
    sliding_checkpoint: Path,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(exporting, "trace", traced)
    real = exporting.stream_weights

    def interrupted(*arguments: Any) -> None:
        real(*arguments)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # like Ctrl-C
        time.sleep(0.5)  # this thread writes weights; the main thread gets the signal

    monkeypatch.setattr(exporting, "stream_weights", interrupted)
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # background jobs ignore SIGINT
    try:
        ended = mistralc("export", sliding_checkpoint, "-o", tmp_path / "made" / "bundle")
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.code == 130
    assert ended.out == ""
    assert ended.err == "mistralc: stopped.\n"
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_that_fails_verification_is_not_published(
    mistralc: Command,
    monkeypatch: pytest.MonkeyPatch,
    sliding_checkpoint: Path,
    tmp_path: Path,
) -> None:
    # A faulty pass could leave a window that is off by one.
    def wrong(spec: Any, activation: Any) -> Any:

        return traced(replace(spec, layer_windows=(7, 7)), activation)

    monkeypatch.setattr(exporting, "trace", wrong)
    ended = mistralc("export", sliding_checkpoint, "-o", tmp_path / "made" / "bundle")
    refused(ended, "does not compute what the checkpoint does", "W", "report this")
    assert list(tmp_path.iterdir()) == []
