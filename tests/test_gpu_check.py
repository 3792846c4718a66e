"""The GPU benchmark without a GPU: its refusal, its steps, its table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import check, measure
from graphs.build import Build
from graphs.errors import MistralcError
from graphs.manifest import Manifest
from runtime.backends.tensorrt import TrtSession
from runtime.system import host
from tests.support import tiny
from tests.support.device_session import RING, SPEC, open_plan

pytest.importorskip("tensorrt_rtx", reason="not installed: pip install 'mistralc[rtx]'")
pytest.importorskip("cuda.bindings", reason="not installed: pip install 'mistralc[rtx]'")

from tests.support.fake_gpu import fake_tensorrt

MACHINE = {
    "gpu": "NVIDIA X", "compute_capability": "8.9", "memory_bytes": 1, "driver": "580.1",
    "cuda": "13.0", "python": "3.11.1", "versions": {"torch": "2.13.0"},
}  # fmt: skip


@pytest.mark.skipif(host.cuda().problem is None, reason="there is a GPU")
def test_without_a_gpu_it_fails_and_writes_nothing(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, check.__file__, "--layers", "1", "--out", tmp_path / "out"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == ""
    assert "This script measures a GPU, and here" in done.stderr
    assert done.stderr.count("\n") == 1, "one line, no traceback"
    assert not (tmp_path / "out").exists()


def test_crashes_failures_and_timeouts_of_a_step_are_distinguished():
    python = [sys.executable, "-c"]
    assert check.step([*python, "print('hello'); print('{\"a\": 1}')"], 60) == {"a": 1}
    with pytest.raises(MistralcError, match="signal 11"):
        check.step([*python, "import os; os.kill(os.getpid(), 11)"], 60)
    with pytest.raises(MistralcError, match="exit 3: words"):
        check.step([*python, "import sys; print('words', file=sys.stderr); sys.exit(3)"], 60)
    with pytest.raises(MistralcError, match="stopped after 1 s"):
        check.step([*python, "import time; time.sleep(60)"], 1)


def test_the_output_of_a_failing_step_is_kept():
    kept: list[object] = []
    program = "print('{\"passed\": false}'); raise SystemExit(1)"
    with pytest.raises(MistralcError, match="exit 1"):
        check.step([sys.executable, "-c", program], 60, kept.append)
    assert kept == [{"passed": False}]


@pytest.mark.parametrize(
    ("name", "capability", "gigabytes", "expected"),
    [
        ("NVIDIA GeForce RTX 4090", "8.9", 25.4, "GeForce RTX 4090"),
        ("NVIDIA A100-SXM4-80GB", "8.0", 85.1, "A100 SXM 80 GB"),
        ("NVIDIA A100-SXM4-40GB", "8.0", 42.4, "A100 40 GB"),
        ("NVIDIA H100 80GB HBM3", "9.0", 85.0, "H100 SXM"),
        ("NVIDIA H100 PCIe", "9.0", 85.0, "H100 PCIe"),
        ("NVIDIA L4", "8.9", 23.6, "L4"),
        ("NVIDIA L40S", "8.9", 47.7, "L40S"),
        ("NVIDIA H200", "9.0", 150.1, "H200"),
        ("NVIDIA GeForce GTX 1060", "6.1", 6.4, None),
    ],
)
def test_a_device_is_found_in_the_catalogue_by_capability_memory_and_name(
    name: str, capability: str, gigabytes: float, expected: str | None
):
    device = host.Device(
        name=name, compute_capability=capability, memory_bytes=int(gigabytes * 1e9)
    )
    found = measure.catalogue_entry(device)
    assert (found and found.name) == expected


def test_the_table_has_a_row_per_batch_and_notes_on_missing_runs():
    bench = {
        "batch": 1, "captured": True, "tokens_per_s": 61.25, "of_datasheet": 0.8,
        "of_copy": None, "ttft_s": 0.5, "decode_s_at": {4096: 0.0163, 65_536: 0.0164},
    }  # fmt: skip
    runs = [
        {"target": "rtx", "precision": "fp16", "verification": {"passed": True},
         "bench": {"by_batch": [bench]}, "bench_gpu_bytes": 15_500_000_000},
        {"target": "tensorrt", "precision": "fp16", "skipped": "tensorrt is not installed"},
        {"target": "cuda", "precision": "fp16", "error": "bench: signal 11: no error output"},
    ]  # fmt: skip
    report = json.loads(json.dumps({"machine": MACHINE, "layers": 32, "runs": runs}))
    text = check.table(report)
    assert "NVIDIA X" in text
    assert "driver 580.1" in text
    figures = "61.2 | 80% | – | 16.30 | – | – | – | 16.40 | 0.500 | 15.50 |"
    assert f"| rtx | fp16 | 1 | yes | yes | {figures}" in text.splitlines()
    assert "- tensorrt fp16 skipped: tensorrt is not installed" in text
    assert "- cuda fp16 error: bench: signal 11" in text


def test_a_bundle_is_measured_at_every_position(tmp_path: Path):
    """On the fake GPU: only the names and signs of the figures are meaningful."""
    path = tmp_path / "engine.plan"
    path.write_bytes(tiny.model_bytes(SPEC, "cpu"))
    manifest = Manifest(
        target="rtx", precision="fp16", activation="float16", model=SPEC, ring=RING,
        window_source="user", checkpoint={}, versions={}, files={},
    )  # fmt: skip
    device = host.Device(name="NVIDIA L4", compute_capability="8.9", memory_bytes=24 * 10**9)

    def load(bundle: Path, build: Build, files: object, *, batch: int) -> TrtSession:
        return open_plan(path, batch=batch)

    with fake_tensorrt(SPEC, RING) as fake, pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "cuda", lambda: host.Cuda(devices=(device,)))
        patch.setattr(measure, "read_manifest", lambda bundle: manifest)
        patch.setattr(measure, "load_session", load)
        patch.setattr(measure, "PROMPT", 20)
        patch.setattr(measure, "COPY_BYTES", 1 << 16)
        found = json.loads(json.dumps(measure.measure(tmp_path, manifest.build, [1])))
        assert not fake.cudart.live
    (batch,) = found["by_batch"]
    assert list(batch["decode_s_at"]) == [str(position) for position in measure.POSITIONS]
    assert all(seconds > 0 for seconds in batch["decode_s_at"].values())
    assert batch["captured"]
    assert batch["step_bytes"] > 0
    assert found["datasheet_bytes_per_s"] == 300 * 10**9
    run = {"target": "rtx", "precision": "fp16", "bench": found}
    assert "| rtx | fp16 | 1 | – | yes |" in check.table(
        {"machine": MACHINE, "layers": 2, "runs": [run]}
    )
