"""Large models read fewer texts, say so, and a wrong bundle is caught all the same."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import exporter.export as exporting
from exporter.checks import texts
from exporter.checks.reference_pass import Text, case_texts, logits_in_one_pass
from exporter.checks.texts import Case, GateText, cases, cases_left_out, gate_text
from exporter.decide import decide
from exporter.decoder.model import logits_at
from exporter.decoder.trace import trace
from exporter.options import BuildOptions
from graphs.build import Build
from graphs.manifest import read_manifest
from graphs.spec import ModelSpec
from graphs.targets import TARGETS
from tests.conftest import Command
from tests.support import tiny
from tests.support.make_checkpoint import PRESETS, tiny_spec

MISTRAL_7B = PRESETS["mistral-7b-v0.1"]


def build_of(spec: ModelSpec, **options: Any) -> Build:
    return decide(spec, TARGETS["cpu"], BuildOptions(**options))


@pytest.fixture
def as_if_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every model read as little as a very large one does."""
    monkeypatch.setattr(texts, "VERIFY_WORK", 1)
    monkeypatch.setattr(texts, "GATE_WORK", 1)


def test_a_small_model_reads_four_windows_and_every_case_of_up_to_160_tokens() -> None:
    build = build_of(PRESETS["smol"], window=64)
    assert gate_text(build) == GateText(windows=4, length=512)
    assert [case.name for case in cases(build, short=True)] == ["W-1", "W", "W+1", "2W+3", "turns"]
    assert cases_left_out(build) == []


def test_a_7b_reads_one_window_and_says_why() -> None:
    read = gate_text(build_of(MISTRAL_7B))
    assert (read.windows, read.length, read.tokens) == (1, 512, 511)
    assert read.shortened is not None
    assert read.shortened.startswith("4 windows of 512 tokens are read for a model of up to 1.8 b")
    assert read.shortened.endswith("this one has 7.2 billion")
    deeper = replace(MISTRAL_7B, num_hidden_layers=128, layer_windows=(None,) * 128)
    assert gate_text(build_of(deeper)).length == 128
    assert gate_text(build_of(replace(MISTRAL_7B, layer_windows=(None,) * 32), context=256)) == (
        replace(read, windows=2, length=256, shortened=read.shortened.replace("512", "256")
                .replace("1.8", "3.7"))
    )  # fmt: skip


def test_cases_that_a_longer_one_covers_are_left_out_of_a_large_model() -> None:
    build = build_of(MISTRAL_7B, window=64)
    assert cases(build, short=True) == [
        Case(name="2W+3", turns=(131,)), Case(name="turns", turns=(33, *[1] * 5, 39, *[1] * 5)),
    ]  # fmt: skip
    assert [(one.case, one.tokens) for one in cases_left_out(build)] == [
        ("W-1", 63), ("W", 64), ("W+1", 65),
    ]  # fmt: skip
    assert all("2W+3 has the same positions" in one.why for one in cases_left_out(build))
    assert len(cases(build, short=False)) == 5, "verify runs them all"


def test_cases_that_are_too_long_for_an_export_are_named() -> None:
    left_out = cases_left_out(build_of(MISTRAL_7B))
    assert [one.tokens for one in left_out] == [4095, 4096, 4097, 8195, 4114]
    assert {one.why for one in left_out} == {"longer than 160 tokens; `mistralc verify` runs it"}


def test_one_pass_over_the_weights_gives_every_text_the_same_bits_as_a_pass_of_its_own() -> None:
    spec = tiny_spec(num_hidden_layers=3, layer_windows=(None, 8, 8))
    decoder = tiny.decoder(spec)
    asked = [
        Text(torch.arange(24).view(2, 12), torch.arange(12)),
        *case_texts(build_of(spec), [Case(name="a", turns=(19,)), Case(name="b", turns=(40,))]),
    ]
    for text, found in zip(asked, logits_in_one_pass(decoder, asked), strict=True):
        assert torch.equal(found, logits_at(decoder, *text))


@pytest.mark.usefixtures("as_if_large", "kept_traces")
def test_what_was_shortened_is_in_the_manifest_and_in_the_report(
    mistralc: Command, sliding_checkpoint: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    ended = mistralc("export", sliding_checkpoint, "-o", bundle, "--precision", "int8wo")
    assert ended.code == 0, ended.err
    manifest = read_manifest(bundle)
    assert manifest.verification is not None
    assert manifest.quantization is not None
    assert [one["case"] for one in manifest.verification["cases"]] == ["2W+3", "turns"]
    assert [one["case"] for one in manifest.verification["left_out"]] == ["W-1", "W", "W+1"]
    quality = manifest.quantization["quality"]
    assert (quality["windows"], quality["length"], quality["tokens"]) == (1, 128, 127)
    assert quality["shortened"].startswith("4 windows of 512 tokens are read")
    report = (bundle / "report" / "verify.md").read_text(encoding="utf-8")
    assert "- W-1 (7 tokens): 2W+3 has the same positions" in report
    assert "Shortened: 4 windows of 512 tokens are read" in report
    again = mistralc("verify", bundle)
    assert again.code == 0, again.err
    verification = read_manifest(bundle).verification
    assert verification is not None
    assert len(verification["cases"]) == 5
    assert "left_out" not in verification
    assert "Shortened: " in (bundle / "report" / "verify.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("as_if_large")
def test_a_wrong_window_is_caught_by_the_shortened_verification(
    mistralc: Command, monkeypatch: pytest.MonkeyPatch, sliding_checkpoint: Path, tmp_path: Path
) -> None:
    def wrong(spec: Any, activation: Any) -> Any:
        return trace(replace(spec, layer_windows=(7, 7)), activation)

    monkeypatch.setattr(exporting, "trace", wrong)
    ended = mistralc("export", sliding_checkpoint, "-o", tmp_path / "made" / "bundle")
    assert ended.code == 1
    assert "does not compute what the checkpoint does" in ended.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("as_if_large", "kept_traces")
def test_a_bundle_that_loses_too_much_is_caught_by_the_shortened_gate(
    mistralc: Command, sliding_checkpoint: Path, tmp_path: Path
) -> None:
    ended = mistralc(
        "export", sliding_checkpoint, "-o", tmp_path / "bundle", "--precision", "int4wo",
        "--symmetric", "--max-ppl-increase", "0.00001",
    )  # fmt: skip
    assert ended.code == 1
    assert "is allowed, so it is not published" in ended.err
    assert list(tmp_path.iterdir()) == []
