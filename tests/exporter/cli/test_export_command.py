"""`export` reports its bundle, and replaces nothing but a bundle, when asked to."""

import json
from pathlib import Path

import numpy as np
import pytest

from exporter import export as exporting
from graphs.manifest import read_manifest
from runtime.bundle.open import open_bundle
from tests.conftest import Command
from tests.exporter.cli.damage_checkpoint import poison
from tests.support.commands import Copy, json_output, refused, succeeded
from tests.support.tiny import traced


def test_export_reports_the_bundle_that_it_wrote(
    mistralc: Command, sliding_checkpoint: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "out" / "bundle"
    result = json_output(
        mistralc("export", sliding_checkpoint, "-o", bundle, "--window", 12, "--chunk", 4, "--json")
    )
    assert result["bundle"] == str(bundle)
    assert result["manifest"] == json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    manifest = open_bundle(bundle).manifest
    assert manifest.model.layer_windows == (12, 12)
    assert manifest.window_source == "user"
    assert manifest.ring.chunk == 4
    assert manifest.verification is not None
    assert manifest.verification["passed"] is True


def test_the_command_that_export_suggests_works(
    mistralc: Command,
    plain_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    out = succeeded(mistralc("export", plain_checkpoint))
    assert out.splitlines()[0].startswith("build/tiny-cpu-fp32: ")
    next_command = out.splitlines()[-1].split()
    assert next_command[:3] == ["mistralc", "generate", "build/tiny-cpu-fp32"]
    text = succeeded(mistralc("generate", next_command[2], "--chat", "What?", "-n", "3"))
    assert text, "the suggested command printed no text"


def test_a_bundle_is_only_replaced_with_force(
    mistralc: Command,
    monkeypatch: pytest.MonkeyPatch,
    sliding_bundle: Path,
    plain_checkpoint: Path,
    copy_of: Copy,
) -> None:
    monkeypatch.setattr(exporting, "trace", traced)
    bundle = copy_of(sliding_bundle)
    old = bundle.stat().st_ino, read_manifest(bundle)
    ended = mistralc("export", plain_checkpoint, "-o", bundle)
    refused(ended, str(bundle), "--force", code=2)
    assert (bundle.stat().st_ino, read_manifest(bundle)) == old

    ended = mistralc("export", plain_checkpoint, "-o", bundle, "--force")
    assert ended.code == 0, ended.err
    assert open_bundle(bundle).manifest.model.layer_windows == (None, None)
    assert list(bundle.parent.iterdir()) == [bundle], "the old bundle was not removed"


def test_a_failed_replacement_keeps_the_old_bundle(
    mistralc: Command,
    monkeypatch: pytest.MonkeyPatch,
    sliding_bundle: Path,
    checkpoint: Path,
    copy_of: Copy,
) -> None:
    monkeypatch.setattr(exporting, "trace", traced)
    poison(checkpoint / "model.safetensors", "lm_head.weight", np.nan)
    bundle = copy_of(sliding_bundle)
    refused(mistralc("export", checkpoint, "-o", bundle, "--force"), "lm_head.weight")
    assert open_bundle(bundle).manifest == read_manifest(sliding_bundle)
    assert list(bundle.parent.iterdir()) == [bundle]


@pytest.mark.parametrize("force", [(), ("--force",)], ids=["", "with --force"])
def test_a_directory_that_is_not_a_bundle_is_never_replaced(
    mistralc: Command, sliding_checkpoint: Path, tmp_path: Path, force: tuple[str, ...]
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("precious", encoding="utf-8")
    ended = mistralc("export", sliding_checkpoint, "-o", home, *force)
    refused(ended, str(home), "not a bundle", "another name", code=2)
    assert [path.name for path in home.iterdir()] == ["thesis.txt"]
    ended = mistralc("export", sliding_checkpoint, "-o", home / "thesis.txt", *force)
    refused(ended, "thesis.txt", "another name", code=2)
    ended = mistralc("export", sliding_checkpoint, "-o", home / "thesis.txt" / "x", *force)
    refused(ended, "thesis.txt", "is a file", code=2)
    assert (home / "thesis.txt").read_text(encoding="utf-8") == "precious"
