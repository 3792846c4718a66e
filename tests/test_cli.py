"""The program as a whole: help, version, exit status, imports."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Command
from tests.support.commands import succeeded, usage_error

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("export", "verify", "calibrate", "eval", "report", "generate", "chat", "inspect",
            "bench", "plan", "doctor", "diff", "keygen", "sign", "serve")  # fmt: skip


def test_help_of_every_command_imports_neither_a_backend_nor_torch() -> None:
    code = f"""
import sys
import mistralc
for command in {["", *COMMANDS]!r}:
    sys.argv = ["mistralc", *([command] if command else []), "--help"]
    try:
        mistralc.main()
    except SystemExit as ended:
        assert ended.code == 0, command
heavy = {{"torch", "onnx", "onnx_ir", "onnxruntime", "safetensors", "jinja2", "tokenizers",
         "fastapi", "llguidance", "uvicorn"}}
loaded = heavy & sys.modules.keys()
assert not loaded, f"--help has imported {{loaded}}"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    help_text = done.stdout.decode()
    for command in COMMANDS:
        assert f"{command} [OPTIONS]" in help_text


def test_generating_imports_neither_torch_nor_onnx(sliding_bundle: Path) -> None:
    # A production host has none of them. A new process is needed: this one has imported them.
    code = """
import sys
import mistralc
try:
    mistralc.main()
except SystemExit as ended:
    assert not ended.code
built = {"torch", "onnx", "onnx_ir", "onnxscript", "safetensors", "gguf"} & sys.modules.keys()
assert not built, f"generate has imported {built}"
"""
    command = [sys.executable, "-c", code, "generate", sliding_bundle, "--chat", "hi", "-n", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b""


def test_version_prints_the_version_of_the_distribution(mistralc: Command) -> None:
    assert re.fullmatch(r"mistralc \d+\.\d+\.\d+\n", succeeded(mistralc("--version")))


def test_the_program_exits_with_the_status_of_its_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mistralc", "inspect", tmp_path / "nothing"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 1
    assert done.stdout == b""
    assert done.stderr.startswith(b"mistralc: There is no bundle at ")


def test_debug_raises_instead_of_printing_one_paragraph(mistralc: Command, tmp_path: Path) -> None:
    assert "Traceback" not in mistralc("inspect", tmp_path).err
    with pytest.raises(Exception, match="is not a bundle"):
        mistralc("inspect", tmp_path, "--debug")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export",), "CHECKPOINT"),
        (("export", "x", "--window", "0"), "--window"),
        (("export", "x", "--chunk", "many"), "--chunk"),
        (("generate", "x", "--unknown"), "No such option: --unknown"),
        (("generate", "x", "y", "z"), "unexpected extra argument"),
        (("generate", "x", "y", "--max-new-tokens", "0"), "--max-new-tokens"),
        (("generate", "x", "y", "--temperature", "warm"), "--temperature"),
        (("verify",), "BUNDLE"),
        (("bench", "x", "--repeat", "0"), "--repeat"),
        (("nonsense",), "No such command 'nonsense'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_usage_error_prints_the_usage(
    mistralc: Command, arguments: tuple[str, ...], message: str
) -> None:
    usage_error(mistralc(*arguments), message)
