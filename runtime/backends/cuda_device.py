"""The first CUDA device: memory, one stream, captured graphs. Knows no model.

Every call is checked. CUDA is reached through `cuda.bindings.runtime`, which is imported when a
device is opened. Closing the device frees all that was allocated, in reverse order.
"""

import ctypes
import importlib
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphs.errors import MistralcError
from runtime.system import host

Bytes = NDArray[np.uint8]

BINDINGS = "cuda.bindings.runtime"


class Gpu:
    """An open device with its own stream. Addresses are plain integers.

    `target` is the name of the target that needs the device; error messages name it.
    """

    def __init__(self, target: str) -> None:
        self._cudart = _bindings(target)
        _require_device(target)
        self._resources = ExitStack()
        self._finalizer = weakref.finalize(self, self._resources.close)
        self._finalizer.atexit = False  # the driver frees everything when the process ends
        self.call("cudaSetDevice", 0)
        # Not the default stream: TensorRT would synchronize on it, and CUDA cannot capture it.
        self._stream = self.call("cudaStreamCreateWithFlags", self._cudart.cudaStreamNonBlocking)
        self._on_close("cudaStreamDestroy", self._stream)

    @property
    def stream(self) -> int:
        """The stream as an integer, as other libraries take it."""
        return int(self._stream)

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the CUDA runtime; returns its value, if it has one.

        Raises MistralcError with CUDA's description if the call fails.
        """
        error, *values = getattr(self._cudart, name)(*arguments)
        if error != self._cudart.cudaError_t.cudaSuccess:
            raise _failed(self._cudart, name, error)
        return values[0] if values else None

    def free(self) -> tuple[int, int]:
        """Free and total bytes of device memory."""
        cudart = self._cudart
        error, free, total = cudart.cudaMemGetInfo()
        if error != cudart.cudaError_t.cudaSuccess:
            raise _failed(cudart, "cudaMemGetInfo", error)
        return int(free), int(total)

    def allocate(self, nbytes: int, what: str) -> int:
        """Allocate `nbytes` of zeroed device memory; returns the address.

        `what` says what the memory is for, in the error if there is too little.
        """
        address = int(self._allocate("cudaMalloc", nbytes, what))
        self._on_close("cudaFree", address)
        self.clear(address, nbytes)
        return address

    def pinned(self, nbytes: int, what: str) -> Bytes:
        """Allocate pinned host memory for asynchronous copies; valid until the device is closed."""
        address = int(self._allocate("cudaMallocHost", nbytes, what))
        self._on_close("cudaFreeHost", address)
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))

    def clear(self, address: int, nbytes: int) -> None:
        """Enqueue zeroing `nbytes` of device memory."""
        self.call("cudaMemsetAsync", address, 0, nbytes, self._stream)

    def copy_in(self, address: int, source: Bytes) -> None:
        """Enqueue a copy from pinned memory to the device."""
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", address, source.ctypes.data, source.nbytes, kind, self._stream)

    def copy_out(self, target: Bytes, address: int) -> None:
        """Enqueue a copy from the device to pinned memory."""
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", target.ctypes.data, address, target.nbytes, kind, self._stream)

    def wait(self) -> None:
        """Wait until the stream is idle; asynchronous errors of the device are raised here."""
        self.call("cudaStreamSynchronize", self._stream)

    def capture(self, work: Callable[[], None]) -> Any:
        """Capture what `work` enqueues as a graph, without running it; None if that fails.

        Shapes and addresses in the graph are those of now.
        """
        mode = self._cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        done = False
        try:
            self.call("cudaStreamBeginCapture", self._stream, mode)
            work()
            done = True
            graph = self.call("cudaStreamEndCapture", self._stream)
            executable = self.call("cudaGraphInstantiate", graph, 0)
            self.call("cudaGraphDestroy", graph)
        except MistralcError:
            if not done:  # the stream must leave capture mode in any case
                self._cudart.cudaStreamEndCapture(self._stream)
            self._cudart.cudaGetLastError()
            return None
        self._on_close("cudaGraphExecDestroy", executable)
        return executable

    def launch(self, graph: Any) -> None:
        """Enqueue a captured graph."""
        self.call("cudaGraphLaunch", graph, self._stream)

    def close(self) -> None:
        """Free everything. Arrays from `pinned` must not be used afterwards."""
        if self._finalizer.alive:
            self._cudart.cudaStreamSynchronize(self._stream)
        self._finalizer()

    def _allocate(self, name: str, nbytes: int, what: str) -> Any:
        error, address = getattr(self._cudart, name)(nbytes)
        if error == self._cudart.cudaError_t.cudaErrorMemoryAllocation:
            self._cudart.cudaGetLastError()
            raise out_of_memory(what, nbytes, *self.free())
        if error != self._cudart.cudaError_t.cudaSuccess:
            raise _failed(self._cudart, name, error)
        return address

    def _on_close(self, name: str, argument: Any) -> None:
        # The function and not `self`, because the finalizer must not keep the device alive.
        self._resources.callback(getattr(self._cudart, name), argument)


def out_of_memory(what: str, needed: int, free: int, total: int) -> MistralcError:
    """The error for too little GPU memory; sizes are in bytes."""
    return MistralcError(
        f"The GPU has no room for {what}: {needed:,} bytes are needed, {free:,} of {total:,} are "
        "free. nvidia-smi shows what else is using it. Free some, take a larger GPU, or export "
        "with a smaller --window, --context or --max-batch, or for TensorRT with "
        "--weight-streaming."
    )


def _bindings(target: str) -> Any:
    try:
        return importlib.import_module(BINDINGS)
    except ImportError as error:
        raise MistralcError(
            f"The target {target} reaches the GPU through {BINDINGS}, which cannot be imported "
            f"here ({error}). Install it: pip install 'mistralc[{target}]'."
        ) from error


def _require_device(target: str) -> None:
    found = host.cuda()
    if found.problem is not None:
        raise MistralcError(
            f"This bundle was built for the target {target}, which needs an NVIDIA GPU, and here "
            f"{found.problem}. Run it on a host with a GPU, where nvidia-smi lists it, or export "
            "the checkpoint again with --target cpu."
        )


def _failed(cudart: Any, name: str, error: Any) -> MistralcError:
    words = cudart.cudaGetErrorString(error)[1].decode(errors="replace")
    remedy = "Run it again; if it fails again, report this with the GPU and its driver's version."
    if error == cudart.cudaError_t.cudaErrorInsufficientDriver:
        version = int(cudart.cudaRuntimeGetVersion()[1])
        remedy = (
            f"Install a driver for CUDA {version // 1000} or later, or another major version of "
            "cuda-bindings."
        )
    return MistralcError(f"The GPU failed in {name}: {words} ({error.name}). {remedy}")
