"""`mistralc eval` as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from calib.evaluation.multiple_choice import (
    measure_accuracy,
    read_questions,
)
from graphs.manifest import read_manifest
from runtime.load import load_session
from runtime.text.tokenizer import Tokenizer
from tests.calib.evaluation.samples import GOOD_QUESTION
from tests.conftest import CONTEXT, Command, Ended

ROOT = Path(__file__).resolve().parents[3]


def told(ended: Ended) -> str:
    assert ended.code == 0, ended.err
    assert ended.err == ""
    return ended.out


def reported(ended: Ended) -> dict[str, Any]:
    out = told(ended)
    assert out.count("\n") == 1
    result: dict[str, Any] = json.loads(out)
    return result


def text_file(directory: Path, count: int = 200) -> Path:
    """Write a text of `count` tokens, BOS included, for a vocabulary of bytes."""
    file = directory / "text.txt"
    file.write_text(("The ring turns. " * count)[: count - 1], encoding="utf-8")
    return file


def task_file(directory: Path) -> Path:
    file = directory / "task.jsonl"
    lines = [GOOD_QUESTION, {"context": "Paris is in", "choices": ["France", "Peru"], "answer": 1}]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return file


def test_eval_reports_perplexity_and_the_text_it_was_measured_on(
    mistralc: Command, sliding_bundle: Path, tmp_path: Path
):
    file = text_file(tmp_path)
    result = reported(
        mistralc("eval", sliding_bundle, "--text", file, "--length", 40, "--limit", 3, "--json")
    )
    assert result["bundle"] == str(sliding_bundle)
    assert result["text"] | {"fingerprint": None} == {
        "source": "text.txt", "fingerprint": None, "windows": 3, "length": 40
    }  # fmt: skip
    assert result["tokens"] == 3 * 39
    # Random weights: near 320, the perplexity of a uniform distribution, up to a factor of 3.
    assert 100 < result["perplexity"] < 1000
    assert (result["against"], result["kl"], result["top1"]) == (None, None, None)
    out = told(mistralc("eval", sliding_bundle, "--text", file, "--length", 40, "--limit", 3))
    assert out.splitlines()[0] == "Text: text.txt; 3 windows of 40 tokens."
    assert out.splitlines()[-1] == f"| 117 | {result['perplexity']:.4f} |"


def test_eval_says_when_it_uses_the_default_text(mistralc: Command, sliding_bundle: Path):
    out = told(mistralc("eval", sliding_bundle, "--limit", 1))
    assert "default" in out.splitlines()[0]
    assert "1 windows of 512 tokens" in out.splitlines()[0]
    result = reported(mistralc("eval", sliding_bundle, "--limit", 1, "--json"))
    assert "default" in result["text"]["source"]


def test_eval_concatenates_several_files(mistralc: Command, sliding_bundle: Path, tmp_path: Path):
    file = text_file(tmp_path)
    ended = mistralc(
        "eval", sliding_bundle, "--text", file, "--text", file, "--length", 40, "--json"
    )
    assert reported(ended)["text"]["windows"] == 10


def test_eval_against_the_checkpoint_measures_the_distance_from_it(
    mistralc: Command, sliding_bundle: Path, sliding_checkpoint: Path, tmp_path: Path
):
    words = ("eval", sliding_bundle, "--text", text_file(tmp_path), "--length", 40)
    result = reported(mistralc(*words, "--against", sliding_checkpoint, "--json"))
    assert result["against"] == str(sliding_checkpoint)
    assert result["kl"] < 1e-10  # see test_distance_from_reference.py
    assert result["top1"] == 1
    assert result["reference_perplexity"] == pytest.approx(result["perplexity"], rel=1e-5)
    out = told(mistralc(*words, "--against", sliding_checkpoint))
    assert "| +0.00% |" in out
    assert out.splitlines()[-1].endswith("| 100.00% |")


def test_eval_against_another_checkpoint_is_refused(
    mistralc: Command, sliding_bundle: Path, plain_checkpoint: Path, tmp_path: Path
):
    words = ("eval", sliding_bundle, "--text", text_file(tmp_path), "--length", 40)
    ended = mistralc(*words, "--against", plain_checkpoint)
    assert ended.code == 1
    assert "is another checkpoint" in ended.err


def test_eval_with_only_choices_reads_no_text(
    mistralc: Command, sliding_bundle: Path, tmp_path: Path
):
    task = task_file(tmp_path)
    result = reported(mistralc("eval", sliding_bundle, "--choices", task, "--json"))
    assert result.keys() == {"bundle", "choices"}
    assert result["choices"]["questions"] == 2
    build = read_manifest(sliding_bundle).build
    session = load_session(sliding_bundle, build, threads=1)
    tokenizer = Tokenizer.load(sliding_bundle)
    expected = measure_accuracy(session, build, tokenizer, read_questions(task))
    assert result["choices"] == expected.to_json()
    assert told(mistralc("eval", sliding_bundle, "--choices", task)) == expected.to_markdown()


def test_eval_measures_both_text_and_choices_if_asked(
    mistralc: Command, sliding_bundle: Path, tmp_path: Path
):
    words = ("eval", sliding_bundle, "--choices", task_file(tmp_path))
    result = reported(mistralc(*words, "--text", text_file(tmp_path), "--length", 40, "--json"))
    assert result["tokens"] == 5 * 39
    assert result["choices"]["questions"] == 2
    assert "windows of 512" in told(mistralc(*words, "--limit", 1))


def test_eval_refuses_what_it_cannot_measure(mistralc: Command, plain_bundle: Path, tmp_path: Path):
    file, task = text_file(tmp_path), tmp_path / "task.jsonl"
    task.write_text("{", encoding="utf-8")
    for words, code, expected in [
        ((), 2, f"Windows of 512 tokens were asked for, and this bundle holds {CONTEXT} in all"),
        (("--text", file), 2, "expected at least one window of 512"),
        (("--text", tmp_path / "none", "--length", 9), 1, "could not be read"),
        (("--choices", task), 1, "line 1 is not JSON"),
        (("--length", 1), 2, "greater than or equal to 2"),
        (("--limit", 0), 2, "greater than or equal to 1"),
    ]:
        ended = mistralc("eval", plain_bundle, *words)
        assert ended.code == code, expected
        assert expected in ended.err
        assert ended.out == ""
    ended = mistralc("eval", tmp_path / "nothing")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith("mistralc: There is no bundle at ")


def test_a_question_longer_than_the_context_is_named_in_the_error(
    mistralc: Command, plain_bundle: Path, tmp_path: Path
):
    task = tmp_path / "task.jsonl"
    task.write_text(json.dumps(GOOD_QUESTION | {"question": "x" * CONTEXT}), encoding="utf-8")
    ended = mistralc("eval", plain_bundle, "--choices", task)
    assert ended.code == 1
    assert f"{task}, line 1: " in ended.err
    assert f"this bundle holds {CONTEXT} in all" in ended.err


BLOCKED = """
import sys
import mistralc
try:
    mistralc.main()
except SystemExit as ended:
    assert not ended.code
built = {"torch", "onnx", "onnx_ir", "onnxscript", "safetensors", "gguf"} & sys.modules.keys()
assert not built, f"eval has imported {built}"
"""


def test_measuring_a_bundle_needs_neither_torch_nor_onnx(sliding_bundle: Path, tmp_path: Path):
    # A production host has none of them. They are imported in this process, so use another.
    words = ("--text", text_file(tmp_path), "--length", "40", "--choices", task_file(tmp_path))
    for arguments in ((sliding_bundle, *words), ("--help",)):
        command = [sys.executable, "-c", BLOCKED, "eval", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        assert done.stderr == b""
