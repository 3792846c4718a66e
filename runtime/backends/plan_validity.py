"""Whether a TensorRT plan may run here, by TensorRT's own word. Loads no plan, knows no bundle.

`Runtime.get_engine_validity` reads a plan's header only: a damaged body is for the manifest's
hashes to find. On a host without a GPU it stops before it compares versions and reports no
reason, so the manifest's version is compared first and the reason is taken from the driver.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

REBUILD, DRIVER, MEMORY, COPY = "rebuild", "driver", "memory", "copy"

REASONS: Mapping[str, tuple[str, str]] = {
    "MALFORMED_ENGINE": ("it is damaged or is no plan", COPY),
    "VERSION_MISMATCH": ("another version of TensorRT built it", REBUILD),
    "UNSUPPORTED_CC": ("it was built for GPUs of another compute capability", REBUILD),
    "OLD_CUDA_DRIVER": ("the NVIDIA driver is older than the plan needs", DRIVER),
    "OLD_CUDA_RUNTIME": ("the CUDA runtime is older than the plan needs", DRIVER),
    "INSUFFICIENT_GPU_MEMORY": ("the GPU has too little memory for it", MEMORY),
    "CUDA_ERROR": ("CUDA does not work", DRIVER),
}
"""By name of TensorRT's `EngineInvalidityDiagnostics`: what is wrong, and what kind of remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Validity:
    """TensorRT's verdict on a plan. `remedies` are from REBUILD, DRIVER, MEMORY and COPY."""

    verdict: str  # VALID, SUBOPTIMAL or INVALID; UNKNOWN where TensorRT has no such check
    reasons: tuple[str, ...] = ()
    remedies: tuple[str, ...] = ()


def validity(plan: Path, module: str) -> Validity:
    """Ask TensorRT (`module` is `tensorrt_rtx` or `tensorrt`) about the plan's header.

    INVALID without a reason is what it answers when it finds no GPU. Raises OSError when the file
    cannot be read, and ImportError when the library is not installed.
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
    """Put TensorRT's diagnostics, by name, into words."""
    known = [REASONS.get(name, (f"TensorRT says {name}", REBUILD)) for name in diagnostics]
    return Validity(
        verdict=verdict,
        reasons=tuple(reason for reason, _ in known),
        remedies=tuple(dict.fromkeys(remedy for _, remedy in known)),
    )


@cache
def _runtime(module: str) -> Any:
    """One runtime with a silent logger, kept: TensorRT holds on to the first logger it is given."""
    trt = importlib.import_module(module)

    class Silent(trt.ILogger):  # type: ignore[name-defined, misc]
        """What TensorRT writes is said again in the checks, in words."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            """Drop the message."""

    logger = Silent()
    return trt.Runtime(logger)
