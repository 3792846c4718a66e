"""The stub CUDA libraries, and the verdict on a bundle that was opened over them."""

import ctypes
import shutil
from typing import Any

import pytest

from benchmarks.gpu.stubs import libraries, placement, prove

CUDA = "CUDAExecutionProvider"

compiled = pytest.mark.skipif(
    shutil.which("cc") is None or shutil.which("readelf") is None, reason="no C compiler"
)


@pytest.fixture(scope="module")
def cudart(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("stubs") / "libcudart.so.13"
    source = (libraries.SOURCES / "cudart.c").read_text()
    libraries.compile_library(source + "SUCCEEDS(cudaLaunchKernel)\n", path, counts=True)
    return ctypes.CDLL(str(path))


@compiled
def test_calls_are_counted_with_what_is_recorded_in_a_graph(cudart: Any) -> None:
    cudart.stub_reset()
    source, target = ctypes.create_string_buffer(b"12345678"), ctypes.create_string_buffer(8)
    graph = ctypes.c_void_p()
    assert cudart.cudaLaunchKernel() == 0
    cudart.cudaStreamBeginCapture(None, 0)
    cudart.cudaLaunchKernel()
    cudart.cudaMemcpyAsync(target, source, ctypes.c_size_t(8), 3, None)
    cudart.cudaStreamEndCapture(None, ctypes.byref(graph))
    cudart.cudaMemcpy(target, source, ctypes.c_size_t(4), 1)
    assert target.raw == b"12345678"
    found = placement.calls(cudart).summary()
    assert found["kernels"] == 2
    assert found["recorded"] == 1
    assert found["captures"] == 1
    assert found["largest_device_copy"] == 8
    assert (found["host_copies"], found["host_copied_bytes"]) == (1, 4)
    assert found["recorded_host_copies"] == 0
    cudart.stub_reset()
    assert placement.calls(cudart).count == {}


@compiled
def test_the_device_has_its_properties_where_cuda_has_them(cudart: Any) -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    real = runtime.cudaDeviceProp()
    cudart.cudaGetDeviceProperties(ctypes.c_void_p(int(real.getPtr())), 0)
    assert (real.major, real.minor, real.multiProcessorCount) == (9, 0, 132)
    assert real.totalGlobalMem == 80 << 30
    assert (real.warpSize, real.maxThreadsPerBlock, real.l2CacheSize) == (32, 1024, 50 << 20)
    assert real.sharedMemPerBlockOptin == 232_448
    assert real.maxThreadsPerMultiProcessor == 2048
    assert real.regsPerMultiprocessor == 65_536


def test_functions_that_a_source_has_are_not_generated_again() -> None:
    source = "int cudaFree(void *address) { return 0; }\nSUCCEEDS(cudaSetDevice)\n"
    wanted = ["cudaFree", "cudaFreeHost", "cudaSetDevice"]
    assert libraries.generated(wanted, source) == "SUCCEEDS(cudaFreeHost)\n"


def test_the_log_says_where_nodes_are() -> None:
    prefix = "[V:onnxruntime:, session_state.cc:1584 VerifyEachNodeIsAssignedToAnEp]"
    mixed = "\n".join([
        "1 Memcpy nodes are added to the graph main_graph for CUDAExecutionProvider.",
        f"{prefix} Node placements",
        f"{prefix}  Node(s) placed on [CPUExecutionProvider]. Number of nodes: 1",
        f"{prefix}   Squeeze (sym_size_int_26)",
        f"{prefix}  Node(s) placed on [{CUDA}]. Number of nodes: 81",
        f"{prefix}   Add (node_add)",
    ])  # fmt: skip
    found = placement.placement(mixed)
    assert found["nodes"] == {"CPUExecutionProvider": 1, CUDA: 81}
    assert found["on_cpu"] == ["Squeeze"]
    assert found["memcpy_nodes"] == 1
    alone = f"{prefix} Node placements\n{prefix} All nodes placed on [{CUDA}]. Number of nodes: 80"
    assert placement.placement(alone)["nodes"] == {CUDA: 80}


def step(**changes: int) -> dict[str, int]:
    """One launch of a graph, with the copies of a token's ids and logits."""
    return {
        "kernels": 0, "products": 0, "graphs": 1, "captures": 0, "recorded": 0,
        "recorded_host_copies": 0, "host_copies": 2, "host_copied_bytes": 30,
        "largest_device_copy": 0, "allocations": 0,
    } | changes  # fmt: skip


def opened(**changes: Any) -> dict[str, Any]:
    """A bundle without faults."""
    first = step(kernels=90, captures=1, recorded=30, allocations=4)
    return {
        "nodes": {CUDA: 80}, "on_cpu": [], "memcpy_nodes": 0, "captured": True, "shared": [],
        "inputs_bytes": 20, "logits_bytes": 10, "smallest_cache_bytes": 64,
        "single": [first, step()], "chunk": [step(kernels=40, graphs=0)], "after": [step()],
    } | changes  # fmt: skip


def test_a_bundle_that_is_captured_has_no_fault() -> None:
    assert list(prove.faults(opened())) == []
    assert prove.launches(opened()) == 30


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nodes": {CUDA: 80, "CPUExecutionProvider": 1}, "on_cpu": ["Squeeze"]}, "CPU: Squeeze"),
        ({"memcpy_nodes": 1}, "1 nodes copy between host and device"),
        ({"captured": False}, "capture was refused"),
        ({"shared": ["past_key.0 and past_value.0"]}, "share memory: past_key.0 and past_value.0"),
        ({"single": [step(), step()]}, "the first token was not recorded"),
        ({"single": [step(captures=1, recorded=9, recorded_host_copies=1), step()]},
         "the graph copies 1 times between host and device"),
        ({"after": [step(kernels=1)]}, "a token should take"),
        ({"after": [step(host_copies=3)]}, "a token should take"),
        ({"after": [step(allocations=1)]}, "a token should take"),
        ({"chunk": [step(largest_device_copy=64)]}, "copies 64 bytes at once; a cache has 64"),
    ],
)  # fmt: skip
def test_every_fault_is_named(changes: dict[str, Any], words: str) -> None:
    assert any(words in fault for fault in prove.faults(opened(**changes)))
