"""Bundles that are missing, damaged, too new or for another host are refused."""

import json
from pathlib import Path

import pytest

from graphs.manifest import Manifest, read_manifest
from tests.conftest import Command
from tests.support.commands import Copy, refused


@pytest.mark.parametrize("command", ["generate", "chat", "inspect", "verify", "bench"])
def test_a_missing_bundle_is_refused(mistralc: Command, tmp_path: Path, command: str) -> None:
    ended = mistralc(command, tmp_path / "nothing", stdin=b"hi\n")
    refused(ended, "There is no bundle at", "nothing", "mistralc export")


def test_a_checkpoint_given_as_a_bundle_is_refused(
    mistralc: Command, sliding_checkpoint: Path
) -> None:
    message = (str(sliding_checkpoint), "is not a bundle", "run `mistralc export` on it first")
    refused(mistralc("generate", sliding_checkpoint, "hi"), *message)
    refused(mistralc("inspect", sliding_checkpoint / "config.json"), "is not a bundle")


@pytest.mark.parametrize(
    "name",
    [
        "model.onnx", "weights.safetensors", "tokenizer.json", "tokenizer_config.json",
        "generation_config.json", "run.pyz", "report/verify.md", "manifest.json",
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["generate", "verify"])
def test_a_bundle_with_one_flipped_bit_is_refused(
    mistralc: Command, sliding_bundle: Path, copy_of: Copy, name: str, command: str
) -> None:
    bundle = copy_of(sliding_bundle)
    path = bundle / name
    data = bytearray(path.read_bytes())
    # In the manifest the flipped bit turns the window 8 into 9, which is still valid JSON.
    at = (
        data.index(b"8,", data.index(b"layer_windows"))
        if name == "manifest.json"
        else len(data) // 2
    )
    data[at] ^= 1
    path.write_bytes(data)
    refused(mistralc(command, bundle, stdin=b"hi"), name, "was changed after", "export it again")


def test_every_file_of_a_bundle_is_in_the_parametrization(sliding_bundle: Path) -> None:
    mark = test_a_bundle_with_one_flipped_bit_is_refused.pytestmark  # type: ignore[attr-defined]
    names = next(m.args[1] for m in mark if m.args[0] == "name")
    assert {*read_manifest(sliding_bundle).files, "manifest.json"} == set(names)


def test_a_bundle_of_a_newer_schema_is_refused(
    mistralc: Command, sliding_bundle: Path, copy_of: Copy
) -> None:
    bundle = copy_of(sliding_bundle)
    manifest = bundle / "manifest.json"
    data = {**json.loads(manifest.read_bytes()), "schema": 2, "new": {"field": 1}}
    manifest.write_text(json.dumps(data), encoding="utf-8")
    refused(mistralc("generate", bundle, "hi"), "schema 2", "newer version", "Install")


def test_a_bundle_for_a_target_that_this_host_cannot_run_is_refused(
    mistralc: Command, sliding_bundle: Path, copy_of: Copy
) -> None:
    bundle = copy_of(sliding_bundle)
    manifest = read_manifest(bundle)
    values = {name: getattr(manifest, name) for name in manifest.__slots__}
    plan = manifest.files["model.onnx"]
    (bundle / "model.onnx").rename(bundle / "engine.plan")
    files = {**manifest.files, "engine.plan": plan}
    del files["model.onnx"]
    other = Manifest(**{**values, "target": "rtx", "files": files})
    (bundle / "manifest.json").write_text(other.to_text(), encoding="utf-8")
    refused(mistralc("generate", bundle, "hi"), "rtx", "GPU")
