"""What the doctor finds about bundles: intact, damaged, without a backend, without room."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from graphs.manifest import Manifest, read_manifest
from graphs.targets import TARGETS
from runtime.doctor.bundle_checks import (
    check_backend,
    check_room,
    rebuild_command,
)
from tests.conftest import Command
from tests.runtime.doctor.conftest import Report
from tests.runtime.doctor.hosts import NO_GPU, ORT, with_gpu
from tests.support.commands import Copy

ROOT = Path(__file__).resolve().parents[3]


def test_an_intact_cpu_bundle_is_ok_without_a_gpu(
    doctor: Callable[..., Report], sliding_bundle: Path
) -> None:
    code, checks = doctor(sliding_bundle)
    assert code == 0
    for name in ("manifest", "files", "backend", "room"):
        assert checks[name]["state"] == "ok", checks[name]
    assert checks["manifest"]["found"].startswith("schema 1, cpu, fp32")


def test_a_damaged_bundle_fails_with_the_command_that_exports_it_again(
    mistralc: Command, doctor: Callable[..., Report], sliding_bundle: Path, copy_of: Copy
) -> None:
    damaged = copy_of(sliding_bundle)
    with (damaged / "weights.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    code, checks = doctor(damaged)
    assert code == 1
    assert checks["files"]["state"] == "failed"
    assert "weights.safetensors was changed" in checks["files"]["found"]
    assert checks["files"]["remedy"] == (
        f"mistralc export PATH/TO/tiny -o {damaged} --target cpu --precision fp32 --chunk 8 --force"
    )
    text = mistralc("doctor", damaged).out
    assert f"→ {checks['files']['remedy']}\n" in text, "the command must be on one line"


def test_a_directory_that_is_not_a_bundle_fails(
    doctor: Callable[..., Report], tmp_path: Path
) -> None:
    code, checks = doctor(tmp_path)
    assert code == 1
    assert "has no manifest.json" in checks["manifest"]["found"]
    assert "files" not in checks


def test_the_rebuild_command_repeats_the_options_of_the_export(plain_bundle: Path) -> None:
    manifest = read_manifest(plain_bundle)
    ring = replace(manifest.ring, max_batch=3)
    again = rebuild_command(Path("B"), replace(manifest, ring=ring))
    assert again.endswith("--context 96 --chunk 8 --max-batch 3 --force")
    model = replace(manifest.model, layer_windows=(7, 7))
    windowed = replace(manifest, window_source="user", model=model, checkpoint={"name": "smollm2"})
    assert rebuild_command(Path("B"), windowed).startswith("mistralc export smollm2 -o B ")
    assert " --window 7 --chunk 8 --force" in rebuild_command(Path("B"), windowed)


def test_a_missing_backend_fails_with_the_install_command(sliding_bundle: Path) -> None:
    code = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "onnxruntime":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
import mistralc
mistralc.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", str(sliding_bundle), "--json"],
        cwd=ROOT, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr.decode()
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["onnxruntime"]["found"] == "not installed"
    assert checks["backend"]["found"] == "the target cpu needs onnxruntime, which is not installed"
    assert checks["backend"]["remedy"] == "pip install 'mistralc[cpu]'"
    assert checks["files"]["state"] == "ok"


CPU, CUDA = TARGETS["cpu"], TARGETS["cuda"]


@pytest.fixture
def manifest(sliding_bundle: Path) -> Manifest:
    return read_manifest(sliding_bundle)


def test_the_backend_must_be_recent_enough_and_have_the_provider(manifest: Manifest) -> None:
    recorded = replace(manifest, versions={"onnxruntime": "1.33.0"})
    assert check_backend(recorded, CPU, replace(ORT, version="1.33.0"), ()).state == "ok"
    older = check_backend(recorded, CPU, replace(ORT, version="1.32.5"), ())
    assert (older.state, older.remedy) == ("warning", "pip install onnxruntime==1.33.0")
    oldest = check_backend(recorded, CPU, replace(ORT, version="1.30.0"), ())
    assert oldest.state == "failed"
    assert "expected 1.31 or later" in oldest.found
    cuda = replace(recorded, target="cuda", versions={})
    assert check_backend(cuda, CUDA, ORT, ("CPUExecutionProvider",)).state == "failed"
    assert check_backend(cuda, CUDA, ORT, ("CUDAExecutionProvider",)).state == "ok"


def test_weights_and_ring_must_fit_the_memory(manifest: Manifest) -> None:
    assert check_room(manifest, 10**10, 10**10, NO_GPU).state == "ok"
    assert check_room(manifest, None, None, NO_GPU).state == "ok"  # unknown memory
    assert check_room(manifest, 10**10, 1000, NO_GPU).state == "warning"
    assert check_room(manifest, 2000, 1000, NO_GPU).state == "failed"
    engine = replace(manifest, target="rtx")
    assert check_room(engine, 2000, 1000, with_gpu("8.9")).state == "ok"
    assert check_room(engine, 10**10, 10**10, with_gpu("8.9", memory=1000)).state == "failed"
