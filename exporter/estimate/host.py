"""What building a bundle takes on the build host: memory, disk and time. Knows no file.

Rates were measured on 2 cores with 24 GiB; each constant says on what. GB is 10^9 bytes.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from graphs.build import Build
from graphs.dtypes import item_size
from graphs.errors import MistralcError
from graphs.spec import ModelSpec
from runtime.bundle.sizes import weight_bytes
from runtime.system.host import memory_available

TRACE_MEMORY = 490_000_000  # bytes; a 7B on fake tensors
PLAN_COPIES, PLAN_MEMORY = 1.14, 200_000_000
"""Anonymous bytes per weight byte, and bytes beside them, while TensorRT-RTX 1.7 streams a plan:
2.65 GB at the most for a plan of 2.27 GB, 16.52 GB for one of 14.49 GB, one profile."""
SESSION_COPIES = 1.2  # ONNX Runtime CPU's bytes per weight byte while verifying, 0.5 and 1.5 GB
VERIFIED_ROWS = 256  # positions of which the verification compares all logits
SPARE = 64 << 20  # bytes on disk beside the weights: graph, tokenizer, report

TRACE_SECONDS, TRACE_SECONDS_PER_LAYER = 6.0, 0.35  # 12 to 18 s for 30 to 32 layers
WRITE_RATE = 0.1e9  # bytes/s to a slow disk; 0.35e9 were seen as well
HASH_RATE = 1.2e9  # bytes/s and core
PLAN_RATE = 14.483e9 / 99  # bytes/s; a 7B in fp16
VERIFY_RATE = 14e6  # weights/s; the quick cases against the PyTorch decoder, 126 to 369 million


@dataclass(frozen=True, slots=True, kw_only=True)
class HostNeeds:
    """What the build host must have. `disk_bytes` is the most that is needed at any time."""

    memory_bytes: int
    disk_bytes: int
    bundle_bytes: int
    seconds: Mapping[str, float]  # by step


def host_needs(build: Build) -> HostNeeds:
    """What building takes. The checkpoint is taken to hold 2 bytes a weight."""
    spec, engine = build.spec, build.target.holds_plan
    weights = sum(weight_bytes(spec, build.storage, build.activation).values())
    seconds = {
        "tracing": TRACE_SECONDS + TRACE_SECONDS_PER_LAYER * spec.num_hidden_layers,
        "writing weights": weights / WRITE_RATE,
    }
    if engine:
        seconds["building the plan"] = weights / PLAN_RATE
        memory = max(TRACE_MEMORY, round(PLAN_COPIES * weights) + PLAN_MEMORY)
    else:
        seconds["hashing"] = weights / HASH_RATE  # the checkpoint is hashed beside the writing
        seconds["verifying"] = spec.num_parameters / VERIFY_RATE
        memory = TRACE_MEMORY + _verification_memory(spec, weights)
    return HostNeeds(
        memory_bytes=memory,
        # An engine is built from a weights file that lies beside it until the plan is complete.
        disk_bytes=(2 if engine else 1) * weights + SPARE,
        bundle_bytes=weights + SPARE,
        seconds=seconds,
    )


def require_host(build: Build, needed: HostNeeds, destination: Path) -> None:
    """Raise MistralcError unless this host has the memory and, at `destination`, the disk."""
    existing = next(path for path in destination.absolute().parents if path.exists())
    free, disk = shutil.disk_usage(existing).free, needed.disk_bytes
    what = f"{build.precision.name} for {build.target.name}"
    if free < disk:
        raise MistralcError(
            f"Exporting this model in {what} needs {disk:,} bytes of disk while it builds, and "
            f"{existing} has {free:,} bytes free. Free some space, choose a directory on another "
            "disk, or a smaller --precision."
        )
    available, memory = memory_available(), needed.memory_bytes
    if available is not None and available < memory:
        raise MistralcError(
            f"Exporting this model in {what} needs about {memory:,} bytes of memory, and "
            f"{available:,} bytes are available here. Stop other programs, export on a host with "
            "more memory, or choose a smaller --precision."
        )


def _verification_memory(spec: ModelSpec, weights: int) -> int:
    """Bytes of the PyTorch decoder in float32 and of the finished bundle, side by side."""
    reference = spec.num_parameters * item_size("float32")
    logits = 2 * VERIFIED_ROWS * spec.vocab_size * item_size("float32")
    packed_again = _embedding(spec) * item_size("float32") if spec.tie_word_embeddings else 0
    return reference + round(SESSION_COPIES * weights) + packed_again + logits


def _embedding(spec: ModelSpec) -> int:
    return spec.vocab_size * spec.hidden_size
