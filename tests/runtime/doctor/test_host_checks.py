"""What the doctor finds on a host, with and without a GPU and backends."""

import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from graphs.targets import TARGETS
from runtime.doctor import host_checks
from runtime.system.host import BACKENDS, Cuda, Library
from tests.conftest import Command
from tests.runtime.doctor.conftest import Report
from tests.runtime.doctor.hosts import NO_GPU, ORT, RTX, by_name, with_gpu

ROOT = Path(__file__).resolve().parents[3]


def test_the_host_of_the_tests_passes_all_checks(doctor: Callable[..., Report]) -> None:
    code, checks = doctor()
    assert code == 0
    assert checks["Python"]["found"].startswith("3.")
    assert "CPUExecutionProvider" in checks["onnxruntime"]["found"]
    for name in ("numpy", "tokenizers", "jinja2"):
        assert checks[name]["found"][0].isdigit()
    assert all((check["remedy"] is None) == (check["state"] == "ok") for check in checks.values())


def test_the_text_output_has_one_line_per_check(mistralc: Command, sliding_bundle: Path) -> None:
    ended = mistralc("doctor", sliding_bundle)
    assert ended.code == 0, ended.err
    assert all(line.startswith(("ok ", "warning ")) for line in ended.out.splitlines())
    assert "7 intact" in ended.out


def test_a_host_without_a_gpu_is_ok() -> None:
    (check,) = host_checks.check_cuda(NO_GPU)
    assert check.state == "ok"
    assert check.found.startswith("none: no NVIDIA driver")


def test_a_driver_that_sees_no_gpu_is_a_warning() -> None:
    checks = by_name(host_checks.check_cuda(Cuda(version=(13, 0), problem="sees no GPU")))
    assert checks["GPU"].state == "warning"
    assert checks["GPU"].remedy == "nvidia-smi"


def test_every_gpu_is_listed_with_memory_and_compute_capability() -> None:
    checks = by_name(host_checks.check_cuda(with_gpu("8.9")))
    assert checks["NVIDIA driver"].found == "580.65, CUDA up to 13.0"
    assert checks["GPU 0"].found == "Test GPU, 24.0 GB, compute capability 8.9"


def test_no_backend_at_all_is_a_warning_with_the_install_command() -> None:
    none = {name: Library(name=name, version=None) for name in BACKENDS}
    last = host_checks.check_backends(none, ())[-1]
    assert (last.state, last.remedy) == ("warning", "pip install 'mistralc[cpu]'")
    assert all(
        check.state == "ok"
        for check in host_checks.check_backends({**none, "onnxruntime": ORT}, ())
    )


def test_a_backend_that_fails_to_import_should_be_reinstalled() -> None:
    broken = replace(RTX, problem="libnvinfer.so: cannot open shared object file")
    (check,) = host_checks.check_backends({"tensorrt_rtx": broken}, ())
    assert check.state == "warning"
    assert "libnvinfer" in check.found
    assert check.remedy == "pip install --force-reinstall tensorrt-rtx-cu13"


def test_a_missing_library_fails_with_the_install_command() -> None:
    check = host_checks.check_required(Library(name="numpy", version=None))
    assert (check.state, check.remedy) == ("failed", "pip install numpy")


def test_an_unusable_cache_directory_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert host_checks.check_cache(None).state == "warning"
    assert host_checks.check_cache(tmp_path / "mistralc" / "hashes.json").state == "ok"
    monkeypatch.setattr(host_checks.shutil, "disk_usage", lambda _path: SimpleNamespace(free=1))
    assert host_checks.check_cache(tmp_path / "mistralc" / "hashes.json").state == "warning"


def test_an_untested_python_version_is_a_warning() -> None:
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


def test_the_oldest_onnxruntime_is_the_one_that_the_extra_requires() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    oldest = ".".join(map(str, TARGETS["cpu"].min_backend_version))
    assert f"onnxruntime>={oldest}" in project["optional-dependencies"]["cpu"]
