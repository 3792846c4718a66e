"""What the doctor finds: hosts with and without a GPU, whole and damaged bundles, plans."""

import ctypes
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from exporter.bundle.staging import list_files
from graphs.manifest import FILE_NAME, Manifest, read_manifest
from runtime.backends.plan_validity import REASONS, explain, validity
from runtime.doctor import host_checks
from runtime.doctor.bundle_checks import (
    OLDEST_ONNXRUNTIME,
    check_backend,
    check_room,
    rebuild_command,
)
from runtime.doctor.finding import Check
from runtime.doctor.plan_checks import Engine, check_driver, check_engine, check_plan
from runtime.system import host
from runtime.system.host import BACKENDS, Cuda, Device, Library
from tests.conftest import Command

ROOT = Path(__file__).resolve().parents[3]
Copy = Callable[[Path], Path]

NO_GPU = Cuda(problem="no NVIDIA driver is installed (libcuda.so.1 is missing)")
RTX = Library(name="tensorrt_rtx", version="1.7.1.116", distribution="tensorrt-rtx-cu13")
ORT = Library(name="onnxruntime", version="1.31.1", distribution="onnxruntime")
REBUILD = "mistralc export smollm2 -o B --target rtx --precision bf16 --chunk 512 --force"


def with_gpu(capability: str, memory: int = 24 * 10**9, version: tuple[int, int] = (13, 0)) -> Cuda:
    device = Device(name="Test GPU", compute_capability=capability, memory_bytes=memory)
    return Cuda(version=version, driver="580.65", devices=(device,))


def by_name(checks: Sequence[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def reported(mistralc: Command, *arguments: object) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit status of `mistralc doctor --json`, and its checks by name."""
    ended = mistralc("doctor", *arguments, "--json")
    assert ended.err == ""
    result = json.loads(ended.out)
    assert result["ok"] is (ended.code == 0)
    return ended.code, {check["name"]: check for check in result["checks"]}


# The host


def test_this_host_is_described_and_found_fit(mistralc: Command) -> None:
    code, checks = reported(mistralc)
    assert code == 0
    assert checks["Python"]["found"].startswith("3.")
    assert "CPUExecutionProvider" in checks["onnxruntime"]["found"]
    for name in ("numpy", "tokenizers", "jinja2"):
        assert checks[name]["found"][0].isdigit()
    assert all((check["remedy"] is None) == (check["state"] == "ok") for check in checks.values())


def test_people_read_a_line_for_each_check(mistralc: Command, sliding_bundle: Path) -> None:
    ended = mistralc("doctor", sliding_bundle)
    assert ended.code == 0, ended.err
    assert all(line.startswith(("ok ", "warning ")) for line in ended.out.splitlines())
    assert "7 intact" in ended.out


def test_to_have_no_gpu_is_no_fault() -> None:
    (check,) = host_checks.check_cuda(NO_GPU)
    assert check.state == "ok"
    assert check.found.startswith("none: no NVIDIA driver")


def test_a_driver_without_a_gpu_is_worth_a_look() -> None:
    checks = by_name(host_checks.check_cuda(Cuda(version=(13, 0), problem="sees no GPU")))
    assert checks["GPU"].state == "warning"
    assert checks["GPU"].remedy == "nvidia-smi"


def test_every_gpu_is_listed_with_memory_and_compute_capability() -> None:
    checks = by_name(host_checks.check_cuda(with_gpu("8.9")))
    assert checks["NVIDIA driver"].found == "580.65, CUDA up to 13.0"
    assert checks["GPU 0"].found == "Test GPU, 24.0 GB, compute capability 8.9"


def test_to_have_no_backend_at_all_is_a_warning_with_the_command() -> None:
    none = {name: Library(name=name, version=None) for name in BACKENDS}
    last = host_checks.check_backends(none, ())[-1]
    assert (last.state, last.remedy) == ("warning", "pip install 'mistralc[cpu]'")
    assert all(
        check.state == "ok"
        for check in host_checks.check_backends({**none, "onnxruntime": ORT}, ())
    )


def test_a_backend_that_does_not_import_is_to_be_installed_again() -> None:
    broken = replace(RTX, problem="libnvinfer.so: cannot open shared object file")
    (check,) = host_checks.check_backends({"tensorrt_rtx": broken}, ())
    assert check.state == "warning"
    assert "libnvinfer" in check.found
    assert check.remedy == "pip install --force-reinstall tensorrt-rtx-cu13"


def test_a_missing_library_comes_with_the_command_that_installs_it() -> None:
    check = host_checks.check_required(Library(name="numpy", version=None))
    assert (check.state, check.remedy) == ("failed", "pip install numpy")


def test_a_full_or_missing_home_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert host_checks.check_cache(None).state == "warning"
    assert host_checks.check_cache(tmp_path / "mistralc" / "hashes.json").state == "ok"
    monkeypatch.setattr(host_checks.shutil, "disk_usage", lambda _path: SimpleNamespace(free=1))
    assert host_checks.check_cache(tmp_path / "mistralc" / "hashes.json").state == "warning"


def test_a_python_that_is_not_tested_is_a_warning() -> None:
    assert host_checks.check_python((3, 11, 0)).state == "ok"
    assert host_checks.check_python((3, 13, 9)).state == "ok"
    assert host_checks.check_python((3, 14, 0)).state == "warning"


def test_the_doctor_imports_neither_torch_nor_onnx() -> None:
    code = """
import sys
from runtime.doctor.host_checks import examine
examine()
loaded = {"torch", "onnx", "onnx_ir"} & sys.modules.keys()
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_oldest_onnxruntime_is_the_one_that_the_extra_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    oldest = ".".join(map(str, OLDEST_ONNXRUNTIME))
    assert f"onnxruntime>={oldest}" in project["optional-dependencies"]["cpu"]


# Facts


class FakeDriver:
    """libcuda.so.1 with one GPU, as ctypes would call it."""

    def __init__(self, init: int = 0, count: int = 1) -> None:
        self.init, self.count = init, count

    def cuInit(self, _flags: int) -> int:  # noqa: N802 - CUDA's name, as are the others
        return self.init

    def cuDriverGetVersion(self, out: Any) -> int:  # noqa: N802
        out._obj.value = 13010
        return 0

    def cuDeviceGetCount(self, out: Any) -> int:  # noqa: N802
        out._obj.value = self.count
        return 0

    def cuDeviceGet(self, out: Any, index: int) -> int:  # noqa: N802
        out._obj.value = index
        return 0

    def cuDeviceGetName(self, out: Any, _size: int, _device: Any) -> int:  # noqa: N802
        out.value = b"NVIDIA L4"
        return 0

    def cuDeviceTotalMem_v2(self, out: Any, _device: Any) -> int:  # noqa: N802
        out._obj.value = 24 << 30
        return 0

    def cuDeviceGetAttribute(self, out: Any, attribute: int, _device: Any) -> int:  # noqa: N802
        out._obj.value = {75: 8, 76: 9}[attribute]
        return 0


def test_the_driver_is_asked_for_its_gpus() -> None:
    found = host.cuda(lambda _name: FakeDriver())
    assert found.version == (13, 1)
    assert found.problem is None
    assert found.devices == (
        Device(name="NVIDIA L4", compute_capability="8.9", memory_bytes=24 << 30),
    )


def test_a_driver_that_does_not_start_or_sees_nothing_says_so() -> None:
    assert "sees no GPU" in str(host.cuda(lambda _name: FakeDriver(init=100)).problem)
    assert "sees no GPU" in str(host.cuda(lambda _name: FakeDriver(count=0)).problem)
    assert "CUDA error 803" in str(host.cuda(lambda _name: FakeDriver(init=803)).problem)


def test_a_host_without_the_driver_library_says_so() -> None:
    found = host.cuda(lambda _name: ctypes.CDLL("libcuda-that-is-not-there.so.1"))
    assert (found.version, found.devices) == (None, ())
    assert "libcuda.so.1 is missing" in str(found.problem)


def test_a_containers_limit_counts_and_its_page_cache_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 20 kB\nMemAvailable: 10 kB\n", encoding="ascii")
    monkeypatch.setattr(host, "PROC", tmp_path)
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    assert (host.memory_total(), host.memory_available()) == (20_480, 10_240)
    (tmp_path / "memory.max").write_text("max\n", encoding="ascii")
    assert host.memory_available() == 10_240
    (tmp_path / "memory.max").write_text("8000\n", encoding="ascii")
    (tmp_path / "memory.current").write_text("5000\n", encoding="ascii")
    (tmp_path / "memory.stat").write_text(
        "anon 4000\ninactive_file 600\nactive_file 300\n", encoding="ascii"
    )
    assert host.memory_available() == 8000 - 5000 + 600 + 300


def test_versions_compare_by_their_numbers() -> None:
    assert host.release("1.31.1rc1") == (1, 31, 1)
    assert host.release("1.9") < host.release("1.31")
    assert host.release("unknown") == ()


# Bundles


def test_a_whole_bundle_for_cpu_is_ok_without_a_gpu(
    mistralc: Command, sliding_bundle: Path
) -> None:
    code, checks = reported(mistralc, sliding_bundle)
    assert code == 0
    for name in ("manifest", "files", "backend", "room"):
        assert checks[name]["state"] == "ok", checks[name]
    assert checks["manifest"]["found"].startswith("schema 1, cpu, fp32")


def test_a_damaged_bundle_fails_and_says_how_to_export_it_again(
    mistralc: Command, sliding_bundle: Path, copy_of: Copy
) -> None:
    damaged = copy_of(sliding_bundle)
    with (damaged / "weights.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    code, checks = reported(mistralc, damaged)
    assert code == 1
    assert checks["files"]["state"] == "failed"
    assert "weights.safetensors was changed" in checks["files"]["found"]
    assert checks["files"]["remedy"] == (
        f"mistralc export PATH/TO/tiny -o {damaged} --target cpu --precision fp32 --chunk 8 --force"
    )
    text = mistralc("doctor", damaged).out
    assert f"→ {checks['files']['remedy']}\n" in text, "the command must stay on one line"


def test_what_is_no_bundle_fails_with_the_reason(mistralc: Command, tmp_path: Path) -> None:
    code, checks = reported(mistralc, tmp_path)
    assert code == 1
    assert "has no manifest.json" in checks["manifest"]["found"]
    assert "files" not in checks


def test_the_command_to_export_again_repeats_what_was_chosen(plain_bundle: Path) -> None:
    manifest = read_manifest(plain_bundle)
    ring = replace(manifest.ring, max_batch=3)
    again = rebuild_command(Path("B"), replace(manifest, ring=ring))
    assert again.endswith("--context 96 --chunk 8 --max-batch 3 --force")
    model = replace(manifest.model, layer_windows=(7, 7))
    slid = replace(manifest, window_source="user", model=model, checkpoint={"name": "smollm2"})
    assert rebuild_command(Path("B"), slid).startswith("mistralc export smollm2 -o B ")
    assert " --window 7 --chunk 8 --force" in rebuild_command(Path("B"), slid)


def test_a_missing_backend_fails_with_the_command_that_installs_it(sliding_bundle: Path) -> None:
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
    assert checks["backend"]["found"] == "the target cpu needs onnxruntime; not installed"
    assert checks["backend"]["remedy"] == "pip install 'mistralc[cpu]'"
    assert checks["files"]["state"] == "ok"


@pytest.fixture
def manifest(sliding_bundle: Path) -> Manifest:
    return read_manifest(sliding_bundle)


def test_a_backend_has_to_be_new_enough_and_of_the_right_kind(manifest: Manifest) -> None:
    recorded = replace(manifest, versions={"onnxruntime": "1.33.0"})
    assert check_backend(recorded, replace(ORT, version="1.33.0"), ()).state == "ok"
    older = check_backend(recorded, replace(ORT, version="1.32.5"), ())
    assert (older.state, older.remedy) == ("warning", "pip install onnxruntime==1.33.0")
    oldest = check_backend(recorded, replace(ORT, version="1.30.0"), ())
    assert oldest.state == "failed"
    assert "1.31 or later is needed" in oldest.found
    cuda = replace(recorded, target="cuda", versions={})
    assert check_backend(cuda, ORT, ("CPUExecutionProvider",)).state == "failed"
    assert check_backend(cuda, ORT, ("CUDAExecutionProvider",)).state == "ok"


def test_a_bundle_has_to_have_room(manifest: Manifest) -> None:
    assert check_room(manifest, 10**10, 10**10, NO_GPU).state == "ok"
    assert check_room(manifest, None, None, NO_GPU).state == "ok"  # where nobody tells
    assert check_room(manifest, 10**10, 1000, NO_GPU).state == "warning"
    assert check_room(manifest, 2000, 1000, NO_GPU).state == "failed"
    engine = replace(manifest, target="rtx")
    assert check_room(engine, 2000, 1000, with_gpu("8.9")).state == "ok"
    assert check_room(engine, 10**10, 10**10, with_gpu("8.9", memory=1000)).state == "failed"


# Plans


@pytest.fixture(scope="session")
def tiny_plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One matrix multiplication as a TensorRT-RTX plan of 15 kB, which needs no GPU to build."""
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
    return Engine(plan=plan, target="rtx", version=version, compute_capabilities=capabilities)


@pytest.mark.skipif(host.cuda().problem is None, reason="there is a GPU")
def test_without_a_gpu_a_sound_plan_is_to_be_checked_where_there_is_one(tiny_plan: Path) -> None:
    check = check_plan(engine(tiny_plan), NO_GPU, REBUILD)
    assert check.state == "warning"
    assert check.found == (
        "its header is a plan's; whether it runs, TensorRT only says where there is a GPU"
    )
    assert "on the host that has the GPU" in str(check.remedy)


@pytest.mark.parametrize("damage", ["garbage", "cut in the header", "empty"])
def test_what_is_no_plan_is_refused_in_words(tiny_plan: Path, tmp_path: Path, damage: str) -> None:
    plan = tmp_path / "engine.plan"
    whole = tiny_plan.read_bytes()
    plan.write_bytes(
        {"garbage": whole[::-1], "cut in the header": whole[:20], "empty": b""}[damage]
    )
    check = check_plan(engine(plan), NO_GPU, REBUILD)
    assert check.state == "failed"
    assert check.found == "TensorRT refuses it: it is damaged or is no plan"
    assert check.remedy == f"Copy the bundle again from where it was built, or: {REBUILD}"


def test_a_plan_that_is_not_there_is_refused(tmp_path: Path, tiny_plan: Path) -> None:
    check = check_plan(engine(tmp_path / tiny_plan.name), NO_GPU, REBUILD)
    assert check.state == "failed"
    assert "could not be read" in check.found


def test_every_diagnostic_of_tensorrt_has_words() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    assert trt.EngineInvalidityDiagnostics.__members__.keys() == REASONS.keys()
    both = explain("INVALID", ["VERSION_MISMATCH", "UNSUPPORTED_CC"])
    assert len(both.reasons) == 2
    assert both.remedies == ("rebuild",)
    assert "SOMETHING_NEW" in explain("INVALID", ["SOMETHING_NEW"]).reasons[0]


def test_a_tensorrt_without_the_check_leaves_it_to_loading(
    tiny_plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(Runtime=object))  # type: ignore[arg-type]
    assert validity(tiny_plan, "tensorrt").verdict == "UNKNOWN"
    check = check_plan(replace(engine(tiny_plan), target="tensorrt"), NO_GPU, REBUILD)
    assert check.state == "ok"


def test_a_plan_of_another_version_is_refused_with_both_named(tiny_plan: Path) -> None:
    checks = by_name(check_engine(engine(tiny_plan, "1.6.0.72"), RTX, with_gpu("8.9"), REBUILD))
    check = checks["TensorRT version"]
    assert check.state == "failed"
    assert "TensorRT 1.6.0.72 built the plan and tensorrt-rtx-cu13 1.7.1.116" in check.found
    assert check.remedy == f"pip install tensorrt-rtx-cu13==1.6.0.72    or: {REBUILD}"
    same = by_name(check_engine(engine(tiny_plan), RTX, NO_GPU, REBUILD))
    assert same["TensorRT version"].state == "ok"
    unknown = by_name(check_engine(engine(tiny_plan, None), RTX, NO_GPU, REBUILD))
    assert unknown["TensorRT version"].state == "warning"


def test_a_plan_without_a_gpu_fails_with_the_export_for_this_host(tiny_plan: Path) -> None:
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
def test_a_plan_needs_a_gpu_that_it_was_built_for(
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


def test_a_driver_older_than_the_librarys_cuda_is_refused() -> None:
    (old,) = check_driver(RTX, with_gpu("8.9", version=(12, 8)))
    assert old.state == "failed"
    assert "CUDA up to 12.8" in old.found
    assert "580 or later" in str(old.remedy)
    assert check_driver(RTX, with_gpu("8.9"))[0].state == "ok"
    assert check_driver(RTX, NO_GPU) == []


@pytest.fixture
def engine_bundle(tiny_plan: Path, sliding_bundle: Path, copy_of: Copy) -> Path:
    """A bundle for `rtx` around the tiny plan; no model is in it, only what the doctor reads."""
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


def test_a_bundle_with_a_plan_has_the_plans_checks(mistralc: Command, engine_bundle: Path) -> None:
    code, checks = reported(mistralc, engine_bundle)
    assert code == 1
    assert checks["files"]["state"] == "ok"
    assert checks["backend"]["found"].startswith("tensorrt-rtx-cu13 1.")
    assert "TensorRT 1.6.0.72 built the plan" in checks["TensorRT version"]["found"]
    assert "GPU of the plan" in checks
    assert "plan engine.plan" in checks


def test_a_plan_that_was_cut_short_is_found_by_its_size(
    mistralc: Command, engine_bundle: Path
) -> None:
    plan = engine_bundle / "engine.plan"
    size = plan.stat().st_size
    os.truncate(plan, size // 2)
    _, checks = reported(mistralc, engine_bundle)
    assert checks["files"]["state"] == "failed"
    assert f"{size // 2:,} bytes; the manifest expects {size:,}" in checks["files"]["found"]
    assert "--target rtx --precision fp16" in checks["files"]["remedy"]
