"""What a host has: GPUs by its driver, memory by the kernel, versions of libraries."""

import ctypes
from pathlib import Path
from typing import Any

import pytest

from runtime.system import host
from runtime.system.host import Device


class FakeDriver:
    """libcuda.so.1 on a host with one GPU, with the interface that ctypes calls."""

    def __init__(self, init: int = 0, count: int = 1) -> None:
        self.init, self.count = init, count

    def cuInit(self, _flags: int) -> int:  # noqa: N802 - CUDA's names
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


def test_gpus_are_read_from_the_driver() -> None:
    found = host.cuda(lambda _name: FakeDriver())
    assert found.version == (13, 1)
    assert found.problem is None
    assert found.devices == (
        Device(name="NVIDIA L4", compute_capability="8.9", memory_bytes=24 << 30),
    )


def test_a_driver_without_a_usable_gpu_is_a_problem() -> None:
    assert "finds no GPU" in str(host.cuda(lambda _name: FakeDriver(init=100)).problem)
    assert "finds no GPU" in str(host.cuda(lambda _name: FakeDriver(count=0)).problem)
    assert "CUDA error 803" in str(host.cuda(lambda _name: FakeDriver(init=803)).problem)


def test_a_missing_driver_library_is_a_problem() -> None:
    found = host.cuda(lambda _name: ctypes.CDLL("libcuda-that-is-not-there.so.1"))
    assert (found.version, found.devices) == (None, ())
    assert "libcuda.so.1 is missing" in str(found.problem)


def test_available_memory_respects_the_containers_limit_without_its_page_cache(
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


def test_versions_compare_numerically() -> None:
    assert host.release("1.31.1rc1") == (1, 31, 1)
    assert host.release("1.9") < host.release("1.31")
    assert host.release("unknown") == ()
