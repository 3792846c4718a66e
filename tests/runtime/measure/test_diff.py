"""Two bundles compared: what they say, what they hold, and what they compute."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from exporter.bundle.staging import list_files
from exporter.export import ExportOptions, export
from graphs.manifest import read_manifest
from runtime.bundle.open import open_bundle
from runtime.load import load_session, make_ring
from runtime.measure import diff
from runtime.measure.diff import ABSENT, Change, compare
from tests.conftest import Command
from tests.support import tiny
from tests.support.make_checkpoint import tiny_spec, write_checkpoint

Copy = Callable[[Path], Path]


def test_changes_are_found_at_any_depth_and_named_by_their_path() -> None:
    a = {"same": 1, "deep": {"list": [1, 2, {"x": 3}], "gone": 4}, "shape": [1], "none": None}
    b = {"same": 1, "deep": {"list": [1, 5, {"x": 6}], "new": 7}, "shape": [1, 2], "none": {}}
    assert list(diff.changes(a, b)) == [
        Change(field=("deep", "list", "1"), a=2, b=5),
        Change(field=("deep", "list", "2", "x"), a=3, b=6),
        Change(field=("deep", "gone"), a=4, b=ABSENT),
        Change(field=("deep", "new"), a=ABSENT, b=7),
        Change(field=("shape",), a=[1], b=[1, 2]),
        Change(field=("none",), a=None, b={}),
    ]


def test_a_bundle_and_its_copy_are_identical_in_all_that_is_compared(
    mistralc: Command, plain_bundle: Path, copy_of: Copy
) -> None:
    copy = copy_of(plain_bundle)
    ended = mistralc("diff", plain_bundle, copy, "--exit-code", "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert found["identical"] is True
    assert found["manifest"] == []
    assert all(file["same"] for file in found["files"])
    logits = found["logits"]
    assert logits["positions"] > 0
    # The same graph on the same weights and threads: equal to the last bit.
    assert (logits["max_abs"], logits["top1"]) == (0, 1)
    assert logits["kl"] == logits["max_kl"] == 0
    assert found["latency"]["steps"] == diff.STEPS
    assert found["latency"]["a_ms"] > 0
    assert found["left_out"] == []


def test_a_precision_shows_in_manifest_sizes_and_logits(
    mistralc: Command, plain_bundle: Path, rounded_bundle: Path
) -> None:
    ended = mistralc("diff", plain_bundle, rounded_bundle, "--json", "--exit-code")
    assert ended.code == 3, ended.err
    found = json.loads(ended.out)
    assert found["identical"] is False
    changed = {tuple(one["field"]): one for one in found["manifest"]}
    assert changed["precision",] == {"field": ["precision"], "a": "fp32", "b": "int8wo"}
    assert changed["quantization",]["a"] is None
    assert not any(field[0] == "model" for field in changed), "it is the same model"
    files = {file["name"]: file for file in found["files"]}
    weights = files["weights.safetensors"]
    assert weights["same"] is False
    assert weights["b"] < weights["a"] / 2  # a byte for four, and scales
    assert files["tokenizer.json"]["same"] is True
    logits = found["logits"]
    assert logits["max_abs"] > 0
    assert 0 < logits["kl"] <= logits["max_kl"]
    assert found["memory"]["b"]["files"] < found["memory"]["a"]["files"]
    assert found["memory"]["a"]["resident"] is not None


def test_compared_logits_are_those_that_each_bundle_computes(
    plain_bundle: Path, rounded_bundle: Path
) -> None:
    # An independent computation: all positions of each text on a new session.
    found = compare(open_bundle(plain_bundle), open_bundle(rounded_bundle)).logits
    assert found is not None
    worst, equal, count = 0.0, 0, 0
    for text in read_manifest(plain_bundle).golden:
        both = []
        for bundle in (plain_bundle, rounded_bundle):
            manifest = read_manifest(bundle)
            session, ring = load_session(bundle, manifest.build), make_ring(manifest.build)
            ids = np.array(text["ids"])
            both.append(tiny.in_turns(session, ring, ids, (len(ids),)))
        worst = max(worst, float(np.abs(both[0] - both[1]).max()))
        equal += int((both[0].argmax(-1) == both[1].argmax(-1)).sum())
        count += len(both[0])
    assert (found.positions, found.top1) == (count, equal / count)
    # Another number of threads changes the summation order: 1e-7 in float32, more after two layers.
    assert found.max_abs == pytest.approx(worst, rel=1e-4)


def test_the_text_output_is_a_tree_of_changes(
    mistralc: Command, plain_bundle: Path, rounded_bundle: Path
) -> None:
    ended = mistralc("diff", plain_bundle, rounded_bundle)
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert '  precision: "fp32" → "int8wo"' in lines
    assert "  passes" in lines
    assert any(line.startswith("  weights.safetensors ") and "differs, -" in line for line in lines)
    for heading in ("manifest (A → B)", "files", "memory"):
        assert heading in lines
    assert "same first choice" in ended.out
    assert "latency of a step, median of 64 each" in ended.out
    assert "not compared" not in ended.out


def test_without_a_backend_only_files_and_manifests_are_compared(
    mistralc: Command, plain_bundle: Path, copy_of: Copy
) -> None:
    # No test host has a GPU and TensorRT 11.
    other = copy_of(plain_bundle)
    (other / "engine.plan").write_bytes(b"a plan")
    manifest = replace(read_manifest(other), target="tensorrt", files=list_files(other))
    (other / "manifest.json").write_text(manifest.to_text(), encoding="utf-8")
    ended = mistralc("diff", plain_bundle, other, "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert found["logits"] is None
    assert found["latency"] is None
    assert found["memory"]["a"]["resident"] is None
    assert len(found["left_out"]) == 1
    assert "tensorrt" in found["left_out"][0]
    assert {"name": "engine.plan", "a": None, "b": 6, "same": False} in found["files"]


def test_a_static_comparison_loads_no_bundle(
    plain_bundle: Path, rounded_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object, **_named: object) -> None:
        pytest.fail("a bundle was loaded")

    monkeypatch.setattr(diff, "load_session", fail)
    found = compare(open_bundle(plain_bundle), open_bundle(rounded_bundle), static=True)
    assert found.changes
    assert found.left_out == ("logits and latency: --static was given",)


@pytest.mark.usefixtures("kept_traces")
def test_logits_of_different_vocabularies_are_not_compared(
    plain_bundle: Path, tmp_path: Path
) -> None:
    spec = tiny_spec(window=8)
    checkpoint = write_checkpoint(tmp_path / "c", replace(spec, vocab_size=spec.vocab_size + 64))
    export(str(checkpoint), tmp_path / "bundle", ExportOptions())
    found = compare(open_bundle(plain_bundle), open_bundle(tmp_path / "bundle"))
    assert found.logits is None
    assert found.latency is not None
    assert found.left_out == (
        f"logits: the vocabularies have {spec.vocab_size:,} and {spec.vocab_size + 64:,} tokens",
    )


def test_a_damaged_bundle_is_not_compared(
    mistralc: Command, plain_bundle: Path, copy_of: Copy
) -> None:
    bundle = copy_of(plain_bundle)
    (bundle / "tokenizer.json").write_text("{}", encoding="utf-8")
    ended = mistralc("diff", plain_bundle, bundle)
    assert ended.code == 1
    assert "tokenizer.json has 2 bytes" in ended.err
    assert ended.out == ""
