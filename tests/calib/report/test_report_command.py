"""`mistralc report` as a user runs it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exporter.checkpoint.open import open_checkpoint
from exporter.export import ExportOptions, export
from exporter.quantization.calibration_table import CalibrationTable
from graphs.quant_scheme import default_scheme, groups
from tests.calib.report.samples import (
    facts,
)
from tests.conftest import Command


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("The ring turns. " * 8, encoding="utf-8")
    return file


def test_report_measures_bundles_and_writes_html_and_markdown(
    mistralc: Command, plain_bundle: Path, rounded_bundle: Path, plain_checkpoint: Path,
    text: Path, tmp_path: Path,
):  # fmt: skip
    out = tmp_path / "made" / "report"
    words = ("report", plain_bundle, rounded_bundle, "--against", plain_checkpoint, "--text", text,
             "--length", 40, "--limit", 2, "-o", out)  # fmt: skip
    ended = mistralc(*words, "--json")
    assert ended.code == 0, ended.err
    result = json.loads(ended.out)
    assert [one["name"] for one in result["measured"]] == [
        "fp32", "int8wo round to nearest block 32"
    ]  # fmt: skip
    plain, rounded = result["measured"]
    assert plain["kl"] < 1e-10 < rounded["kl"], "see tests/calib/evaluation"
    assert rounded["read_bytes"] < plain["read_bytes"] < plain["file_bytes"]
    assert result["measured_on"]["text"] == "text.txt"
    assert result["measured_on"]["windows"].startswith("2 of 40 tokens")
    page, markdown = (out / name for name in ("index.html", "report.md"))
    assert "int8wo round to nearest block 32" in page.read_text(encoding="utf-8")
    assert str(tmp_path) not in page.read_text(encoding="utf-8") + markdown.read_text("utf-8")
    before = page.read_bytes(), markdown.read_bytes()
    ended = mistralc(*words)
    assert ended.code == 0, ended.err
    assert (page.read_bytes(), markdown.read_bytes()) == before
    assert ended.out.startswith("| bundle ")
    assert str(page) in ended.out.splitlines()[-1]


def test_report_and_eval_give_the_same_perplexity(
    mistralc: Command, plain_bundle: Path, text: Path, tmp_path: Path
):
    words = (plain_bundle, "--text", text, "--length", 40, "--json")
    found = json.loads(mistralc("report", *words, "-o", tmp_path / "report").out)
    alone = json.loads(mistralc("eval", *words).out)
    assert found["measured"][0]["perplexity"] == alone["perplexity"]
    assert found["measured"][0]["kl"] is None


@pytest.mark.usefixtures("kept_traces")
def test_report_shows_the_calibration_table_of_a_bundle(
    mistralc: Command, plain_checkpoint: Path, plain_bundle: Path, text: Path, tmp_path: Path
):
    spec = open_checkpoint(str(plain_checkpoint)).spec
    scheme = default_scheme("int8wo", block=32)
    table = CalibrationTable(
        precision="int8wo", method="by hand", data={"source": "a story", "windows": 3},
        checkpoint=open_checkpoint(str(plain_checkpoint)).fingerprint(), versions={"python": "3"},
        schemes={name: scheme for group in groups(spec) for name in group.readers},
        tensors={}, facts=facts(layers=2),
    )  # fmt: skip
    folder, made = tmp_path / "table", tmp_path / "bundle"
    folder.mkdir()
    table.write(folder)
    options = ExportOptions(precision="int8wo", calibration=folder, context=96, chunk=8)
    export(str(plain_checkpoint), made, options)
    words = ("--text", text, "--length", 40, "--table", folder, "-o", tmp_path / "report")
    ended = mistralc("report", made, *words)
    assert ended.code == 0, ended.err
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    for expected in ("Error of each layer", "int8wo by hand", "a story (windows 3)"):
        assert expected in page
    refused = mistralc("report", plain_bundle, *words)
    assert refused.code == 2
    assert "none of the bundles was made with it" in refused.err


def test_report_checks_its_arguments_before_it_measures(
    mistralc: Command, plain_bundle: Path, text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr("runtime.load.load", None)  # loading would be a TypeError
    file = tmp_path / "file"
    file.write_text("", encoding="utf-8")
    for words, code, expected in [
        ((), 2, "holds 96 in all"),  # windows of 512
        (("--text", text, "--length", 40, "--table", tmp_path), 1, "is not a calibration table"),
        (("--text", text, "-o", file), 2, "cannot be made a directory"),
        (("--text", text, "--length", 1), 2, "greater than or equal to 2"),
    ]:
        destination = () if "-o" in words else ("-o", tmp_path / "report")
        ended = mistralc("report", plain_bundle, *words, *destination)
        assert (ended.code, ended.out) == (code, ""), ended.err
        assert expected in ended.err
    ended = mistralc("report", tmp_path / "nothing", "-o", tmp_path / "report")
    assert ended.code == 1
    assert ended.err.startswith("mistralc: There is no bundle at ")


def test_bundles_that_tokenize_a_text_differently_are_not_compared(
    mistralc: Command, plain_bundle: Path, text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    from exporter.checks import corpus

    read, calls = corpus.read_corpus, []

    def differing(*arguments: Any) -> corpus.Corpus:
        found = read(*arguments)
        calls.append(found)
        documents = tuple(ids[len(calls) - 1 :] for ids in found.documents)
        return replace(found, documents=documents)

    monkeypatch.setattr(corpus, "read_corpus", differing)
    words = ("--text", text, "--length", 40, "-o", tmp_path / "report")
    ended = mistralc("report", plain_bundle, plain_bundle, *words)
    assert ended.code == 2
    assert "make different tokens of the same text" in ended.err


def test_without_matplotlib_the_error_says_how_to_install_it(
    mistralc: Command, plain_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ended = mistralc("report", plain_bundle, "-o", tmp_path / "report")
    assert ended.code == 1
    assert "pip install 'mistralc[report]'" in ended.err
    assert not (tmp_path / "report").exists()
