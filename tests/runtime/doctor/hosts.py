"""Facts about hosts that the doctor is given: GPUs and libraries. Asserts nothing."""

from collections.abc import Sequence

from runtime.doctor.finding import Check
from runtime.system.host import Cuda, Device, Library

NO_GPU = Cuda(problem="no NVIDIA driver is installed (libcuda.so.1 is missing)")
RTX = Library(name="tensorrt_rtx", version="1.7.1.116", distribution="tensorrt-rtx-cu13")
ORT = Library(name="onnxruntime", version="1.31.1", distribution="onnxruntime")


def with_gpu(capability: str, memory: int = 24 * 10**9, version: tuple[int, int] = (13, 0)) -> Cuda:
    """A host with one GPU of this compute capability and memory in bytes."""
    device = Device(name="Test GPU", compute_capability=capability, memory_bytes=memory)
    return Cuda(version=version, driver="580.65", devices=(device,))


def by_name(checks: Sequence[Check]) -> dict[str, Check]:
    """The checks by name."""
    return {check.name: check for check in checks}
