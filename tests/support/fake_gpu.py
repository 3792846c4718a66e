"""A fake GPU in host memory: the parts of CUDA's and TensorRT's runtimes that sessions call.

Streams, copies, captured graphs and errors follow the rules of the real libraries; types and enums
are the real ones. A "plan" is an ONNX model that runs on ONNX Runtime CPU. Tests on it show that a
session binds, copies, captures and frees correctly, not that a real GPU agrees.
"""

# Names and parameters are those of CUDA and TensorRT.
# ruff: noqa: N802, N815

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from graphs.contract import GraphContract
from graphs.dtypes import Dtype
from graphs.spec import ModelSpec, RingSpec
from runtime.backends import cuda_device, onnxruntime_cuda, tensorrt_library
from runtime.system import host

real = pytest.importorskip("cuda.bindings.runtime")

OK = real.cudaError_t.cudaSuccess
TOTAL = 1 << 30  # bytes of the device
ELEMENT = {"float32": 1, "int64": 7}
ALIGN = 256


class FakeCudart:
    """The functions of `cuda.bindings.runtime` that `runtime.backends.cuda_device` calls."""

    def __init__(self, total: int = TOTAL) -> None:
        self.total, self.live, self.used = total, {}, 0
        self.captured: list[Callable[[], None]] | None = None
        self.streams = 0  # all have one number: their work runs at once
        self.calls: list[str] = []
        self.fail: dict[str, Any] = {}  # by function: the error that it returns

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cuda"):
            raise AttributeError(name)
        return getattr(real, name)  # enums and error names; real functions would find no driver

    def _stream(self, work: Callable[[], None]) -> tuple[Any]:
        if self.captured is not None:
            self.captured.append(work)
        else:
            work()
        return (OK,)

    def cudaSetDevice(self, device: int) -> tuple[Any]:
        assert device == 0
        return (OK,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, Any]:
        assert flags == real.cudaStreamNonBlocking
        self.streams += 1
        self.live["stream"] = 0
        return OK, real.cudaStream_t(7)

    def cudaStreamDestroy(self, stream: Any) -> tuple[Any]:
        self.streams -= 1
        if self.streams == 0:
            del self.live["stream"]
        return (OK,)

    def cudaStreamSynchronize(self, stream: Any) -> tuple[Any]:
        assert int(stream) == 7
        assert self.captured is None, "a stream that is being captured must not be synchronized"
        return (OK,)

    def cudaMemGetInfo(self) -> tuple[Any, int, int]:
        return OK, self.total - self.used, self.total

    def _take(self, nbytes: int) -> tuple[Any, int | None]:
        assert self.captured is None, "nothing may be allocated during a capture"
        if self.used + nbytes > self.total:
            return real.cudaError_t.cudaErrorMemoryAllocation, None
        block = np.full(nbytes + ALIGN, 0xAB, np.uint8)  # not zeros, as on a GPU
        address = -(-block.ctypes.data // ALIGN) * ALIGN
        self.live[address], self.used = block, self.used + nbytes
        return OK, address

    def _give(self, address: int) -> tuple[Any]:
        self.used -= self.live.pop(address).nbytes - ALIGN
        return (OK,)

    cudaMalloc = cudaMallocHost = _take
    cudaFree = cudaFreeHost = _give

    def cudaMemsetAsync(self, address: int, value: int, count: int, stream: Any) -> tuple[Any]:
        return self._stream(lambda: ctypes.memset(address, value, count) and None)

    def cudaMemcpyAsync(
        self, to: int, source: int, count: int, kind: Any, stream: Any
    ) -> tuple[Any]:
        assert kind in real.cudaMemcpyKind.__members__.values()
        self.calls.append("copy")
        return self._stream(lambda: ctypes.memmove(to, source, count) and None)

    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> tuple[Any]:
        assert mode in real.cudaStreamCaptureMode.__members__.values()
        self.captured = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: Any) -> tuple[Any, Any]:
        graph, self.captured = self.captured, None
        error = self.fail.get("cudaStreamEndCapture", OK)
        return error, graph

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, Any]:
        assert flags == 0
        made = list(graph)
        self.live[f"graph {id(made)}"] = made
        return OK, made

    def cudaGraphDestroy(self, graph: Any) -> tuple[Any]:
        return (OK,)

    def cudaGraphExecDestroy(self, graph: Any) -> tuple[Any]:
        del self.live[f"graph {id(graph)}"]
        return (OK,)

    def cudaGraphLaunch(self, graph: Any, stream: Any) -> tuple[Any]:
        self.calls.append("launch")
        for work in graph:
            work()
        return (OK,)

    def cudaGetLastError(self) -> tuple[Any]:
        return (OK,)


class FakeContext:
    """An execution context: its bound shapes and addresses, and execution."""

    def __init__(self, engine: "FakeEngine", config: Any) -> None:
        self.engine, self.config = engine, config
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.profile, self.scratch = 0, (0, 0)

    def set_device_memory(self, address: int, nbytes: int) -> None:
        assert address % ALIGN == 0
        assert self.engine.cudart.live[address].nbytes >= nbytes
        self.scratch = address, nbytes

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile, self.shapes = profile, {}
        return isinstance(stream, int)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.get_tensor_profile_shape(name, self.profile)
        self.shapes[name] = shape
        return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % ALIGN == 0
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 7
        assert self.scratch[1] >= self.engine.get_device_memory_size_for_profile_v2(self.profile)
        if self.engine.broken:
            return False
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        self.engine.cudart._stream(lambda: self.engine.run(shapes, addresses))
        return True


class FakeEngine:
    """A deserialized plan with the tensors of the graph contract, backed by an ONNX model."""

    def __init__(self, fake: "FakeTrt", model: bytes) -> None:
        self.fake, self.cudart, self.broken = fake, fake.cudart, False
        self.session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
        self.inputs = {tensor.name: tensor for tensor in fake.contract.inputs}
        self.outputs = {tensor.name: tensor for tensor in fake.contract.outputs}
        self.contexts: list[FakeContext] = []
        self.streamable_weights_size = 0
        self.weight_streaming_budget_v2 = -1
        self.num_optimization_profiles = len(fake.profiles)
        self.num_io_tensors = len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name: str) -> Any:
        modes = self.fake.TensorIOMode
        return modes.INPUT if name in self.inputs else modes.OUTPUT

    def get_tensor_location(self, name: str) -> Any:
        return self.fake.TensorLocation.DEVICE

    def get_tensor_dtype(self, name: str) -> Any:
        types = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64"}
        tensor = (self.inputs | self.outputs)[name]
        return getattr(self.fake.DataType, types[tensor.dtype])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        tensor = (self.inputs | self.outputs)[name]
        return tensor.sized(self.fake.contract.sizes(batch=-1, tokens=-1, wanted=-1))

    def get_aliased_input_tensor(self, name: str) -> str | None:
        past = name.replace("present_", "past_")
        return past if past in self.inputs and not self.fake.separate else None

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        rows, tokens = self.fake.profiles[profile]
        smallest = self.fake.contract.sizes(batch=1, tokens=1, wanted=1)
        largest = self.fake.contract.sizes(batch=rows, tokens=tokens, wanted=tokens)
        return [self.inputs[name].sized(each) for each in (smallest, smallest, largest)]

    def get_weight_streaming_automatic_budget(self) -> int:
        return 1000

    def create_runtime_config(self) -> Any:
        config = SimpleNamespace(cache=None, create_runtime_cache=lambda: self.fake.cache)
        config.set_runtime_cache = lambda cache: setattr(config, "cache", cache) or True
        config.set_execution_context_allocation_strategy = lambda kind: config.__setattr__(
            "strategy", kind
        )
        return config

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return 1000 * self.fake.profiles[profile][1]  # a kilobyte for each token

    def create_execution_context(self, config: Any) -> FakeContext:
        strategy = getattr(config, "strategy", config)  # TensorRT takes the strategy itself
        assert strategy == self.fake.ExecutionContextAllocationStrategy.USER_MANAGED
        self.contexts.append(FakeContext(self, config))
        return self.contexts[-1]

    def run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        binding = self.session.io_binding()
        for name, tensor in self.inputs.items():
            bound = (ELEMENT[tensor.dtype], shapes[name], addresses[name])
            binding.bind_input(name, "cpu", 0, *bound)
        batch, wanted = shapes["logits_indices"]
        for name, tensor in self.outputs.items():
            past = name.replace("present_", "past_")
            shape = shapes.get(past, (batch, wanted, self.fake.contract.spec.vocab_size))
            binding.bind_output(name, "cpu", 0, ELEMENT[tensor.dtype], shape, addresses[name])
        self.session.run_with_iobinding(binding)


class FakeCache:
    """TensorRT-RTX's runtime cache."""

    def __init__(self) -> None:
        self.loaded: bytes | None = None

    def deserialize(self, blob: bytes) -> bool:
        self.loaded = blob
        return True

    def serialize(self) -> bytes:
        return b"kernels"


class FakeTrt:
    """The module; enums and the logger's base class are those of TensorRT-RTX."""

    def __init__(
        self, cudart: FakeCudart, spec: ModelSpec, ring: RingSpec, activation: Dtype = "float32"
    ) -> None:
        self._real = pytest.importorskip("tensorrt_rtx")
        self.cudart = cudart
        self.contract = GraphContract(spec=spec, ring=ring, activation=activation)
        self.profiles = [(ring.max_batch, ring.chunk)]  # largest (rows, tokens) of each profile
        self.refuse = False  # whether to refuse every plan
        self.separate = False  # whether the caches are copied instead of updated
        self.cache = FakeCache()
        self.engines: list[FakeEngine] = []
        self.prepare: Callable[[FakeEngine], None] = lambda engine: None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def Runtime(self, log: Any) -> Any:
        def deserialize(view: Any) -> FakeEngine | None:
            data = bytes(view)
            if self.refuse or data.startswith(b"damaged"):
                log.log(self.ILogger.ERROR, "Magic tag does not match")
                return None
            self.engines.append(FakeEngine(self, data))
            self.prepare(self.engines[-1])
            return self.engines[-1]

        return SimpleNamespace(deserialize_cuda_engine=deserialize)


@contextmanager
def fake_cuda(total: int = TOTAL) -> Iterator[FakeCudart]:
    """Make everything that looks for CUDA find a device in host memory."""
    cudart = FakeCudart(total)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_device, "_bindings", lambda target: cudart)
        patch.setattr(host, "cuda", lambda: host.Cuda(version=(13, 0)))
        yield cudart


@contextmanager
def fake_tensorrt(spec: ModelSpec, ring: RingSpec, total: int = TOTAL) -> Iterator[FakeTrt]:
    """Make `TrtSession` run "plans" that are float32 ONNX models."""
    with fake_cuda(total) as cudart, pytest.MonkeyPatch.context() as patch:
        module = FakeTrt(cudart, spec, ring)
        patch.setattr(tensorrt_library, "load", lambda target: module)
        tensorrt_library.log_of.cache_clear()
        yield module
        tensorrt_library.log_of.cache_clear()


@contextmanager
def fake_provider() -> Iterator[FakeCudart]:
    """Make `CudaOrtSession` run on ONNX Runtime CPU with memory of the fake GPU."""
    name = "CPUExecutionProvider"
    with fake_cuda() as cudart, pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime_cuda, "PROVIDER", name)
        patch.setattr(onnxruntime_cuda, "DEVICE", "cpu")
        patch.setattr(onnxruntime_cuda, "providers", lambda forms, graphs: [(name, {})])
        yield cudart
