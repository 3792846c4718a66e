"""`verify` compares a bundle with its checkpoint and records the result."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from exporter.bundle.staging import list_files
from graphs.manifest import read_manifest
from runtime.bundle.open import open_bundle
from tests.conftest import Command, Ended
from tests.support.commands import Copy, json_output, refused, succeeded


def test_verify_records_its_result_in_the_manifest_and_the_report(
    mistralc: Command, sliding_bundle: Path, copy_of: Copy
) -> None:
    bundle = copy_of(sliding_bundle)
    result = json_output(mistralc("verify", bundle, "--json"))
    assert result["passed"] is True
    assert result["against"] == "its own weights"
    assert {case["case"] for case in result["cases"]} == {"W-1", "W", "W+1", "2W+3", "turns"}
    assert open_bundle(bundle).manifest.verification == result
    report = (bundle / "report" / "verify.md").read_text(encoding="utf-8")
    assert "with its own weights" in report
    assert "Verdict: passed" in report


def test_verify_prints_a_table_and_a_verdict(
    mistralc: Command, plain_bundle: Path, copy_of: Copy
) -> None:
    out = succeeded(mistralc("verify", copy_of(plain_bundle), "--short"))
    assert re.search(r"\| chunk-1 \| 7 \| \d\.\d\de-\d\d ", out)
    assert "Verdict: passed" in out


@pytest.mark.usefixtures("kept_traces")
def test_verify_short_skips_long_cases(
    mistralc: Command, plain_checkpoint: Path, tmp_path: Path
) -> None:
    from exporter.checks.texts import SHORT

    bundle = tmp_path / "bundle"
    succeeded(mistralc("export", plain_checkpoint, "-o", bundle, "--chunk", SHORT, "-q"))
    short = json_output(mistralc("verify", bundle, "--short", "--json"))["cases"]
    whole = json_output(mistralc("verify", bundle, "--json"))["cases"]
    assert max(case["tokens"] for case in short) <= SHORT
    assert max(case["tokens"] for case in whole) == 2 * SHORT + 3


def test_verify_against_the_checkpoint_passes(
    mistralc: Command, sliding_bundle: Path, sliding_checkpoint: Path, copy_of: Copy
) -> None:
    bundle = copy_of(sliding_bundle)
    result = json_output(mistralc("verify", bundle, "--against", sliding_checkpoint, "--json"))
    assert result["against"] == "the checkpoint"
    assert result["passed"] is True


def test_verify_changes_the_hash_of_its_report_only(
    mistralc: Command, sliding_bundle: Path, copy_of: Copy
) -> None:
    bundle = copy_of(sliding_bundle)
    (bundle / "notes.txt").write_text("not part of the bundle", encoding="utf-8")
    before = read_manifest(bundle).files
    succeeded(mistralc("verify", bundle, "--short"))
    after = read_manifest(bundle).files
    assert {name for name in after if after[name] != before.get(name)} == {"report/verify.md"}


def test_weights_changed_together_with_their_hashes_fail_verification(
    mistralc: Command, sliding_bundle: Path, sliding_checkpoint: Path, copy_of: Copy
) -> None:
    bundle = copy_of(sliding_bundle)
    weights = bundle / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    begin, end = header["model.layers.0.mlp.up_proj.weight"]["data_offsets"]
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + begin : start + end] = bytes(end - begin)  # zeros
    weights.write_bytes(data)
    assert_verify_fails(mistralc, bundle, "--against", sliding_checkpoint)


def test_a_graph_changed_together_with_its_hash_fails_verification(
    mistralc: Command, sliding_bundle: Path, copy_of: Copy
) -> None:
    bundle = copy_of(sliding_bundle)
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    window = [
        tensor
        for tensor in model.graph.initializer
        if not tensor.external_data and onnx.numpy_helper.to_array(tensor).tolist() == 8
    ]
    assert len(window) == 1, "the window should be a single constant of the graph"
    window[0].CopyFrom(
        onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(window[0]) - 1, window[0].name)
    )
    onnx.save(model, bundle / "model.onnx")
    assert_verify_fails(mistralc, bundle)


def assert_verify_fails(mistralc: Command, bundle: Path, *arguments: object) -> None:
    """Update the bundle's hashes and assert that verify fails it and records that."""
    manifest = replace(read_manifest(bundle), files=list_files(bundle))
    (bundle / "manifest.json").write_text(manifest.to_text(), encoding="utf-8")
    assert succeeded(mistralc("inspect", bundle)), "the bundle must open, or verify would not run"
    ended = mistralc("verify", bundle, *arguments)
    assert ended.code == 1
    assert "Verdict: FAILED" in ended.out
    assert "does not compute what the checkpoint does" in ended.err
    verification = open_bundle(bundle).manifest.verification
    assert verification is not None
    assert verification["passed"] is False
    assert "FAILED" in (bundle / "report" / "verify.md").read_text(encoding="utf-8")
    assert "FAILED" in succeeded(mistralc("inspect", bundle))


def test_verify_against_another_checkpoint_is_refused(
    mistralc: Command, sliding_bundle: Path, plain_checkpoint: Path, copy_of: Copy
) -> None:
    bundle = copy_of(sliding_bundle)
    ended = mistralc("verify", bundle, "--against", plain_checkpoint)
    refused(ended, str(plain_checkpoint), "another checkpoint", "leave --against out")
    assert open_bundle(bundle).manifest == read_manifest(sliding_bundle), "nothing is recorded"


def test_a_full_disk_during_verify_leaves_the_bundle_whole(
    mistralc: Command,
    sliding_bundle: Path,
    tmpfs: Callable[[int], Path],
) -> None:
    disk = tmpfs(1024)
    bundle = Path(shutil.copytree(sliding_bundle, disk / "bundle"))
    free = shutil.disk_usage(disk).free
    # One free page holds the new report but not the new manifest.
    (disk / "filler").write_bytes(bytes(free - 4096))
    before = read_manifest(bundle)
    ended = mistralc("verify", bundle, "--short")
    assert ended.code == 1
    assert "Verdict: passed" in ended.out, "the result is printed although it cannot be saved"
    refused(Ended(ended.code, "", ended.err), str(bundle), "No space left", "verify again")
    assert open_bundle(bundle).manifest == before
    assert not list(bundle.rglob("*.partial"))


@pytest.fixture
def read_only(tmp_path: Path, tmpfs: Callable[[int], Path], sliding_bundle: Path) -> Iterator[Path]:
    """A read-only bundle: by its permissions or, for root, by its mount."""
    if os.geteuid() == 0:
        disk = tmpfs(1024)
        bundle = Path(shutil.copytree(sliding_bundle, disk / "bundle"))
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        yield bundle
        return
    bundle = Path(shutil.copytree(sliding_bundle, tmp_path / "bundle"))
    folders = (bundle, bundle / "report")
    for folder in folders:
        folder.chmod(0o555)
    yield bundle
    for folder in folders:
        folder.chmod(0o755)


def test_a_read_only_bundle_runs_but_verify_reports_that_it_cannot_save(
    mistralc: Command, read_only: Path
) -> None:
    ended = mistralc("generate", read_only, "hi", "-n", "3")
    assert (ended.code, ended.err) == (0, "")
    assert mistralc("inspect", read_only).code == 0
    ended = mistralc("verify", read_only, "--short")
    assert "Verdict: passed" in ended.out, "the result is printed although it cannot be saved"
    refused(Ended(ended.code, "", ended.err), str(read_only), "could not be written", "writable")
