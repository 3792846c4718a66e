"""Whether this host can run mistralc, and a bundle: checks and their remedies. Prints nothing.

Each check is a function from facts to frozen `Check` values, so that every verdict can be tested
without the hardware it is about. Loads no model and never imports torch or onnx.
"""

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from graphs.errors import MistralcError
from graphs.manifest import Manifest, read_manifest
from graphs.spec import ring_bytes
from runtime import host
from runtime.bundle import Progress, cache_file, open_bundle
from runtime.engine_check import Engine, check_engine, check_gpu_memory, engine_of
from runtime.host import Cuda, Library

State = Literal["ok", "warning", "failed"]

OLDEST_ONNXRUNTIME = (1, 31)  # as pyproject.toml asks: the first whose opset 24 we rely on
LEAST_CACHE = 64 << 20  # bytes of disk below which a warning is due

REQUIRED = ("numpy", "tokenizers", "jinja2")
BACKENDS: dict[str, tuple[str, ...]] = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt_rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
}
"""By import name: the packages that carry it."""

BACKEND_OF = {"cpu": "onnxruntime", "cuda": "onnxruntime", "rtx": "tensorrt_rtx",
              "tensorrt": "tensorrt"}  # fmt: skip
"""What a bundle's target runs on; the target is also the name of mistralc's extra."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One finding. `remedy` is the command to run, or the one thing to do, unless it is ok."""

    name: str
    state: State
    found: str
    remedy: str | None = None
