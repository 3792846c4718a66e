"""Ask TensorRT whether a plan can run on this host. Loads no plan, knows no bundle.

`Runtime.get_engine_validity` reads only a plan's header, so a damaged body is not found here. On a
host without a GPU it stops before it compares versions and reports no reason: callers should
compare versions first, and take the reason from the driver.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

REBUILD, DRIVER, MEMORY, COPY = "rebuild", "driver", "memory", "copy"

REASONS: Mapping[str, tuple[str, str]] = {
    "MALFORMED_ENGINE": ("it is damaged or not a plan", COPY),
    "VERSION_MISMATCH": ("another version of TensorRT built it", REBUILD),
    "UNSUPPORTED_CC": ("it was built for GPUs of another compute capability", REBUILD),
    "OLD_CUDA_DRIVER": ("the NVIDIA driver is older than the plan needs", DRIVER),
    "OLD_CUDA_RUNTIME": ("the CUDA runtime is older than the plan needs", DRIVER),
    "INSUFFICIENT_GPU_MEMORY": ("the GPU has too little memory for it", MEMORY),
    "CUDA_ERROR": ("CUDA does not work", DRIVER),
}
"""By name in TensorRT's `EngineInvalidityDiagnostics`: what is wrong, and the kind of remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Validity:
    """TensorRT's verdict on a plan. `remedies` are among REBUILD, DRIVER, MEMORY and COPY."""

    verdict: str  # VALID, SUBOPTIMAL or INVALID; UNKNOWN if this TensorRT has no such check
    reasons: tuple[str, ...] = ()
    remedies: tuple[str, ...] = ()


def validity(plan: Path, module: str) -> Validity:
    """Ask TensorRT (`module` is `tensorrt_rtx` or `tensorrt`) about the plan's header.

    If TensorRT finds no GPU, it answers INVALID without a reason. Raises OSError if the file cannot
    be read, and ImportError if the library is not installed.
    """
    trt = importlib.import_module(module)
    if not hasattr(trt.Runtime, "get_engine_validity"):
        return Validity(verdict="UNKNOWN")
    runtime = _runtime(module)
    with plan.open("rb") as file:
        header = file.read(runtime.engine_header_size)
    verdict, flags = runtime.get_engine_validity(header)
    kinds: Mapping[str, Any] = trt.EngineInvalidityDiagnostics.__members__
    return explain(verdict.name, [name for name, kind in kinds.items() if int(kind) & int(flags)])


def explain(verdict: str, diagnostics: list[str]) -> Validity:
    """Describe TensorRT's diagnostics, given by name."""
    known = [REASONS.get(name, (f"TensorRT says {name}", REBUILD)) for name in diagnostics]
    return Validity(
        verdict=verdict,
        reasons=tuple(reason for reason, _ in known),
        remedies=tuple(dict.fromkeys(remedy for _, remedy in known)),
    )


@cache
def _runtime(module: str) -> Any:
    """One runtime with a silent logger for the process: TensorRT keeps its first logger."""
    trt = importlib.import_module(module)

    class Silent(trt.ILogger):  # type: ignore[name-defined, misc]
        """Drops what TensorRT prints: the verdict carries the same reasons."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            """Drop the message."""

    logger = Silent()
    return trt.Runtime(logger)
