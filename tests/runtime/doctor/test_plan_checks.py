"""What the doctor finds about TensorRT plans: version, GPU, driver, damage."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from exporter.bundle.staging import list_files
from graphs.manifest import FILE_NAME, read_manifest
from graphs.targets import TARGETS
from runtime.backends.plan_validity import REASONS, explain, validity
from runtime.doctor.plan_checks import Engine, check_driver, check_engine, check_plan
from runtime.system import host
from tests.runtime.doctor.conftest import Report
from tests.runtime.doctor.hosts import NO_GPU, RTX, by_name, with_gpu
from tests.support.commands import Copy

REBUILD = "mistralc export smollm2 -o B --target rtx --precision bf16 --chunk 512 --force"


@pytest.fixture(scope="session")
def tiny_plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TensorRT-RTX plan of one matrix multiplication: 15 kB, built without a GPU."""
    trt = pytest.importorskip("tensorrt_rtx")
    import numpy as np

    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    x = network.add_input("x", trt.float16, (4, 64))
    weight = network.add_constant((64, 64), trt.Weights(np.ones((64, 64), np.float16)))
    none = trt.MatrixOperation.NONE
    product = network.add_matrix_multiply(x, none, weight.get_output(0), none)
    network.mark_output(product.get_output(0))
    plan = tmp_path_factory.mktemp("plan") / "engine.plan"
    plan.write_bytes(builder.build_serialized_network(network, builder.create_builder_config()))
    return plan


def engine(plan: Path, version: str | None = "1.7.1.116", *capabilities: str) -> Engine:
    return Engine(
        plan=plan, target=TARGETS["rtx"], version=version, compute_capabilities=capabilities
    )


@pytest.mark.skipif(host.cuda().problem is None, reason="there is a GPU")
def test_without_a_gpu_a_valid_plan_gives_a_warning_to_check_it_on_one(tiny_plan: Path) -> None:
    check = check_plan(engine(tiny_plan), NO_GPU, REBUILD)
    assert check.state == "warning"
    assert check.found == (
        "its header is valid; TensorRT checks the rest only on a host with a GPU"
    )
    assert "on the host with the GPU" in str(check.remedy)


@pytest.mark.parametrize("damage", ["garbage", "cut in the header", "empty"])
def test_a_damaged_plan_fails_with_a_reason_and_a_remedy(
    tiny_plan: Path, tmp_path: Path, damage: str
) -> None:
    plan = tmp_path / "engine.plan"
    whole = tiny_plan.read_bytes()
    plan.write_bytes(
        {"garbage": whole[::-1], "cut in the header": whole[:20], "empty": b""}[damage]
    )
    check = check_plan(engine(plan), NO_GPU, REBUILD)
    assert check.state == "failed"
    assert check.found == "TensorRT refuses it: it is damaged or not a plan"
    assert check.remedy == f"Copy the bundle again from where it was built, or: {REBUILD}"


def test_a_missing_plan_fails(tmp_path: Path, tiny_plan: Path) -> None:
    check = check_plan(engine(tmp_path / tiny_plan.name), NO_GPU, REBUILD)
    assert check.state == "failed"
    assert "could not be read" in check.found


def test_every_diagnostic_of_tensorrt_has_an_explanation() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    assert trt.EngineInvalidityDiagnostics.__members__.keys() == REASONS.keys()
    both = explain("INVALID", ["VERSION_MISMATCH", "UNSUPPORTED_CC"])
    assert len(both.reasons) == 2
    assert both.remedies == ("rebuild",)
    assert "SOMETHING_NEW" in explain("INVALID", ["SOMETHING_NEW"]).reasons[0]


def test_a_tensorrt_without_a_validity_check_defers_to_loading(
    tiny_plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(Runtime=object))  # type: ignore[arg-type]
    assert validity(tiny_plan, "tensorrt").verdict == "UNKNOWN"
    check = check_plan(replace(engine(tiny_plan), target=TARGETS["tensorrt"]), NO_GPU, REBUILD)
    assert check.state == "ok"


def test_a_plan_of_another_version_fails_with_both_versions_named(tiny_plan: Path) -> None:
    checks = by_name(check_engine(engine(tiny_plan, "1.6.0.72"), RTX, with_gpu("8.9"), REBUILD))
    check = checks["TensorRT version"]
    assert check.state == "failed"
    assert "TensorRT 1.6.0.72 built the plan, but tensorrt-rtx-cu13 1.7.1.116" in check.found
    assert check.remedy == f"pip install tensorrt-rtx-cu13==1.6.0.72    or: {REBUILD}"
    same = by_name(check_engine(engine(tiny_plan), RTX, NO_GPU, REBUILD))
    assert same["TensorRT version"].state == "ok"
    unknown = by_name(check_engine(engine(tiny_plan, None), RTX, NO_GPU, REBUILD))
    assert unknown["TensorRT version"].state == "warning"


def test_without_a_gpu_a_plan_fails_with_the_export_command_for_this_host(tiny_plan: Path) -> None:
    check = by_name(check_engine(engine(tiny_plan), RTX, NO_GPU, REBUILD))["GPU of the plan"]
    assert check.state == "failed"
    assert "no NVIDIA driver is installed" in check.found
    assert "7.5 or 8.0 or 8.6 or 8.9 or 12.x" in check.found
    assert str(check.remedy).endswith(
        "mistralc export smollm2 -o B --target cpu --precision fp32 --chunk 512 --force"
    )


@pytest.mark.parametrize(
    ("gpu", "built_for", "state"),
    [("8.9", (), "ok"), ("12.1", (), "ok"), ("9.0", (), "failed"), ("8.9", ("12.0",), "failed"),
     ("8.9", ("8.9", "12.0"), "ok"), ("8.6", ("8.9",), "failed")],
)  # fmt: skip
def test_a_plan_needs_a_gpu_of_a_compute_capability_it_was_built_for(
    tiny_plan: Path, gpu: str, built_for: tuple[str, ...], state: str
) -> None:
    checks = check_engine(engine(tiny_plan, "1.7.1.116", *built_for), RTX, with_gpu(gpu), REBUILD)
    check = by_name(checks)["GPU of the plan"]
    assert check.state == state
    assert f"compute capability {gpu}" in check.found
    if gpu == "9.0":
        assert "--target tensorrt" in str(check.remedy)
    elif state == "failed":
        assert check.remedy == REBUILD


def test_a_driver_older_than_the_librarys_cuda_fails() -> None:
    (old,) = check_driver(RTX, with_gpu("8.9", version=(12, 8)))
    assert old.state == "failed"
    assert "CUDA up to 12.8" in old.found
    assert "580 or later" in str(old.remedy)
    assert check_driver(RTX, with_gpu("8.9"))[0].state == "ok"
    assert check_driver(RTX, NO_GPU) == []


@pytest.fixture
def engine_bundle(tiny_plan: Path, sliding_bundle: Path, copy_of: Copy) -> Path:
    """A bundle for `rtx` with the tiny plan in place of a model."""
    bundle = copy_of(sliding_bundle)
    for name in ("model.onnx", "weights.safetensors"):
        (bundle / name).unlink()
    (bundle / "engine.plan").write_bytes(tiny_plan.read_bytes())
    manifest = replace(
        read_manifest(bundle),
        target="rtx", precision="fp16", activation="float16",
        versions={"mistralc": "0.1.0", "tensorrt-rtx-cu13": "1.6.0.72"}, files=list_files(bundle),
    )  # fmt: skip
    (bundle / FILE_NAME).write_text(manifest.to_text(), encoding="utf-8")
    return bundle


def test_doctor_checks_the_plan_of_a_bundle(
    doctor: Callable[..., Report], engine_bundle: Path
) -> None:
    code, checks = doctor(engine_bundle)
    assert code == 1
    assert checks["files"]["state"] == "ok"
    assert checks["backend"]["found"].startswith("tensorrt-rtx-cu13 1.")
    assert "TensorRT 1.6.0.72 built the plan" in checks["TensorRT version"]["found"]
    assert "GPU of the plan" in checks
    assert "plan engine.plan" in checks


def test_a_truncated_plan_is_found_by_its_size(
    doctor: Callable[..., Report], engine_bundle: Path
) -> None:
    plan = engine_bundle / "engine.plan"
    size = plan.stat().st_size
    os.truncate(plan, size // 2)
    _, checks = doctor(engine_bundle)
    assert checks["files"]["state"] == "failed"
    assert f"{size // 2:,} bytes; the manifest expects {size:,}" in checks["files"]["found"]
    assert "--target rtx --precision fp16" in checks["files"]["remedy"]
