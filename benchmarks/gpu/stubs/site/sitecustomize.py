"""Let `cuda.bindings.runtime` call the stub of the CUDA runtime, in every Python process.

The real module has its own copy of the CUDA runtime inside, which needs a driver. Python imports
this file at its start if its folder is on PYTHONPATH. Enums and types are the real module's.
"""

import ctypes
import sys
from contextlib import suppress
from types import ModuleType
from typing import Any

NAME, LIBRARY = "cuda.bindings.runtime", "libcudart.so.13"
ADDRESS, SIZE, NUMBER = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int

RESULTS: dict[str, tuple[type[Any], ...]] = {
    "cudaDriverGetVersion": (NUMBER,),
    "cudaGetDeviceCount": (NUMBER,),
    "cudaGraphInstantiate": (ADDRESS,),
    "cudaMalloc": (ADDRESS,),
    "cudaMallocHost": (ADDRESS,),
    "cudaMemGetInfo": (SIZE, SIZE),
    "cudaRuntimeGetVersion": (NUMBER,),
    "cudaStreamCreateWithFlags": (ADDRESS,),
    "cudaStreamEndCapture": (ADDRESS,),
}
"""What a function returns through pointers beside its error code; others return nothing."""
RESULT_LAST = {"cudaStreamEndCapture"}  # all others take their results' addresses first
ARGUMENTS: dict[str, tuple[type[Any], ...]] = {
    "cudaFree": (ADDRESS,),
    "cudaFreeHost": (ADDRESS,),
    "cudaGetLastError": (),
    "cudaGraphDestroy": (ADDRESS,),
    "cudaGraphExecDestroy": (ADDRESS,),
    "cudaGraphInstantiate": (ADDRESS, ctypes.c_ulonglong),
    "cudaGraphLaunch": (ADDRESS, ADDRESS),
    "cudaMalloc": (SIZE,),
    "cudaMallocHost": (SIZE,),
    "cudaMemGetInfo": (),
    "cudaMemcpyAsync": (ADDRESS, ADDRESS, SIZE, NUMBER, ADDRESS),
    "cudaMemsetAsync": (ADDRESS, NUMBER, SIZE, ADDRESS),
    "cudaSetDevice": (NUMBER,),
    "cudaDriverGetVersion": (),
    "cudaGetDeviceCount": (),
    "cudaRuntimeGetVersion": (),
    "cudaStreamBeginCapture": (ADDRESS, NUMBER),
    "cudaStreamCreateWithFlags": (ctypes.c_uint,),
    "cudaStreamDestroy": (ADDRESS,),
    "cudaStreamEndCapture": (ADDRESS,),
    "cudaStreamSynchronize": (ADDRESS,),
}
"""The functions that mistralc calls, with what they take beside the addresses of their results."""


class StubRuntime(ModuleType):
    """`cuda.bindings.runtime`, with the functions of ARGUMENTS from the stub library."""

    def __init__(self, real: ModuleType) -> None:
        super().__init__(NAME)
        self._real, self._library = real, ctypes.CDLL(LIBRARY)

    def __getattr__(self, name: str) -> Any:
        return self._function(name) if name in ARGUMENTS else getattr(self._real, name)

    def cudaGetErrorString(self, error: Any) -> tuple[Any, bytes]:  # noqa: N802 - CUDA's name
        """The error code of this call, and the text for `error`."""
        words = self._library.cudaGetErrorString
        words.restype = ctypes.c_char_p
        return self._real.cudaError_t.cudaSuccess, words(int(error))

    def _function(self, name: str) -> Any:
        function, results = getattr(self._library, name), RESULTS.get(name, ())
        pointers = [ctypes.POINTER(each) for each in results]
        last = name in RESULT_LAST
        function.argtypes = [*ARGUMENTS[name], *pointers] if last else [*pointers, *ARGUMENTS[name]]

        def call(*arguments: Any) -> tuple[Any, ...]:
            values = [each() for each in results]
            given = [getattr(one, "value", one) for one in arguments]
            places = [ctypes.byref(value) for value in values]
            code = function(*given, *places) if last else function(*places, *given)
            return self._real.cudaError_t(code), *(value.value for value in values)

        return call


with suppress(ImportError, OSError):  # no cuda-bindings, or no stubs: nothing to replace
    import cuda.bindings.runtime  # type: ignore[import-untyped]

    cuda.bindings.runtime = sys.modules[NAME] = StubRuntime(cuda.bindings.runtime)
