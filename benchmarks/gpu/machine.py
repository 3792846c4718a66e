"""Print this host's GPU, driver and versions, and its copy bandwidth, as one line of JSON.

python -m benchmarks.gpu.machine
"""

import json
import platform
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from benchmarks.gpu.measure import copy_bandwidth
from graphs.errors import MistralcError
from graphs.targets import backend_distributions
from runtime.system import host

LIBRARIES = (*backend_distributions(), "cuda-bindings", "torch")


def main() -> int:
    found = host.cuda()
    if found.problem is not None:
        print(f"machine: {found.problem}; expected a GPU that nvidia-smi lists.", file=sys.stderr)
        return 1
    try:
        print(json.dumps({**machine(found), "copy_bytes_per_s": copy_bandwidth()}))
    except MistralcError as error:
        print(f"machine: {error}", file=sys.stderr)
        return 1
    return 0


def machine(found: host.Cuda) -> dict[str, Any]:
    """The GPU, driver, CUDA and library versions of this host."""
    device = found.devices[0]
    return {
        "gpu": device.name,
        "compute_capability": device.compute_capability,
        "memory_bytes": device.memory_bytes,
        "driver": found.driver,
        "cuda": ".".join(map(str, found.version or ())),
        "python": platform.python_version(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of the libraries that are installed; ONNX Runtime's also if it is only unpacked."""
    found = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    with suppress(ImportError):
        import onnxruntime

        found.setdefault("onnxruntime", onnxruntime.__version__)
    return found


if __name__ == "__main__":
    sys.exit(main())
