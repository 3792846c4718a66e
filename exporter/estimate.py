"""What a model will need, worked out from its shape alone. Knows no file and no graph.

Every figure is arithmetic on `ModelSpec` and `RingSpec`; where a rate enters, it was measured on
2 cores with 24 GiB, and the constant says on what. GB is 10^9 bytes.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from exporter.quantization.policy import quantized_bytes
from graphs.errors import MistralcError, UsageError
from graphs.gpu_catalogue import Gpu
from graphs.spec import ITEM_SIZE, Dtype, ModelSpec, RingSpec, ring_bytes
from runtime.system.host import memory_available

Target = Literal["cpu", "cuda", "rtx", "tensorrt"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "int8wo", "int4wo", "fp8"]

UNQUANTIZED: Mapping[str, Dtype] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Precisions whose weights are of the type that the graph computes in."""

CPU_PRECISIONS = ("fp32", "int8", "int8wo", "int4wo", "fp8")  # ONNX Runtime CPU computes in float32
ENGINES = ("rtx", "tensorrt")

RUNTIME_RESERVE = 2**30
"""Bytes kept free for CUDA's context, kernels and driver. An allowance, not a measurement."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one model needs in one precision on one target. Rings are full, for all rows."""

    target: str
    precision: str
    activation: Dtype
    spec: ModelSpec
    ring: RingSpec
    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    kv_bytes_per_token_multi_head: int  # if every query head had keys and values of its own
    ring_slots: Mapping[int | None, int]  # by window
    ring_bytes: int
    ring_bytes_multi_head: int
    kv_bytes_unwindowed: int  # of all rows at max_position_embeddings
    activation_parts: Mapping[str, int]  # bytes of the candidates for the largest activation
    read_bytes_per_step: int  # of GPU memory, to decode one token in every row
    host: HostNeeds

    @property
    def activation_bytes(self) -> int:
        """The largest activation: the others are freed or not yet there."""
        return max(self.activation_parts.values())

    @property
    def run_bytes(self) -> int:
        """Memory that running takes, the runtime's own apart."""
        return self.weight_bytes + self.ring_bytes + self.activation_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How a plan does on one GPU. `refusal` says why it cannot run there whatever its size."""

    plan: Plan
    gpu: Gpu
    left_bytes: int  # negative: it lacks as many
    tokens_per_s: float  # of all rows; no kernel reads memory faster
    refusal: str | None

    @property
    def fits(self) -> bool:
        """Whether it runs there."""
        return self.left_bytes >= 0 and self.refusal is None


def plan(spec: ModelSpec, ring: RingSpec, target: str, precision: str) -> Plan:
    """Work out what a model needs. Raises UsageError for a precision that the target lacks."""
    activation = activation_of(target, precision)
    weights = weight_bytes(spec, target, precision, activation)
    multi_head = spec.num_attention_heads // spec.num_key_value_heads
    full_ring, per_token = ring_bytes(spec, ring, activation), spec.kv_bytes_per_token(activation)
    # A decode step reads one row of the embedding, unless the output layer is the embedding.
    unread = 0 if spec.tie_word_embeddings else _embedding(spec) * ITEM_SIZE[activation]
    return Plan(
        target=target,
        precision=precision,
        activation=activation,
        spec=spec,
        ring=ring,
        parameters=spec.num_parameters,
        weight_bytes=weights,
        kv_bytes_per_token=per_token,
        kv_bytes_per_token_multi_head=per_token * multi_head,
        ring_slots={size: ring.capacity(size) for size in spec.windows},
        ring_bytes=full_ring,
        ring_bytes_multi_head=full_ring * multi_head,
        kv_bytes_unwindowed=ring.max_batch * spec.max_position_embeddings * per_token,
        activation_parts=activation_parts(spec, ring, activation),
        read_bytes_per_step=weights - unread + full_ring,
        host=host_needs(spec, target, weights),
    )


def activation_of(target: str, precision: str) -> Dtype:
    """What the graph computes in. Raises UsageError when the target has no such precision."""
    for option, value, known in (
        ("--target", target, get_args(Target)),
        ("--precision", precision, get_args(Precision)),
    ):
        if value not in known:
            raise UsageError(f"{option} is {value!r}; one of {', '.join(known)} is expected.")
    if target != "cpu":
        return UNQUANTIZED.get(precision, "float16")
    if precision not in CPU_PRECISIONS:
        raise UsageError(
            f"--precision is {precision}; the target cpu computes in float32 and takes "
            f"{', '.join(CPU_PRECISIONS)}. Choose one of them, or another --target."
        )
    return "float32"


def weight_bytes(spec: ModelSpec, target: str, precision: str, activation: Dtype) -> int:
    """Bytes of all weights, quantized or as the graph computes."""
    if precision in UNQUANTIZED:
        return spec.num_parameters * ITEM_SIZE[activation]
    return quantized_bytes(spec, target, precision, activation)


def activation_parts(spec: ModelSpec, ring: RingSpec, activation: Dtype) -> dict[str, int]:
    """Bytes of the candidates for the largest activation, for S = chunk tokens in B rows.

    The scores are an upper bound: an attention that is fused, as TensorRT's, never stores them.
    """
    item, rows, tokens = ITEM_SIZE[activation], ring.max_batch, ring.max_batch * ring.chunk
    slots = [ring.capacity(size) for size in spec.windows]
    return {
        "logits": rows * spec.vocab_size * item,  # [B, 1, V]
        "mlp": 2 * tokens * spec.intermediate_size * item,  # gate and up, [B, S, F] each
        "attention": tokens * sum(slots)  # a mask for each window, [B, 1, S, C], one byte each
        + tokens * spec.num_attention_heads * max(slots) * item,  # scores [B, H, S, C]
    }


def host_needs(spec: ModelSpec, target: str, weights: int) -> HostNeeds:
    """What building takes. The checkpoint is taken to hold 2 bytes a weight."""
    engine = target in ENGINES
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


def fit(needed: Plan, gpu: Gpu) -> Fit:
    """Set a plan against a GPU's memory and bandwidth."""
    refusal = None
    if needed.target == "rtx" and not gpu.runs_rtx:
        refusal = (
            f"TensorRT-RTX does not support compute capability {gpu.compute_capability}; use "
            "--target tensorrt"
        )
    elif needed.precision == "fp8" and not gpu.runs_fp8:
        refusal = "FP8 needs compute capability 8.9 or later; use --precision int8"
    steps_per_s = gpu.bandwidth_bytes_per_s / needed.read_bytes_per_step
    return Fit(
        plan=needed,
        gpu=gpu,
        left_bytes=gpu.memory_bytes - RUNTIME_RESERVE - needed.run_bytes,
        tokens_per_s=needed.ring.max_batch * steps_per_s,
        refusal=refusal,
    )


def require_host(needed: Plan, destination: Path) -> None:
    """Raise MistralcError unless this host has the memory and, at `destination`, the disk."""
    existing = next(path for path in destination.absolute().parents if path.exists())
    free, disk = shutil.disk_usage(existing).free, needed.host.disk_bytes
    what = f"{needed.precision} for {needed.target}"
    if free < disk:
        raise MistralcError(
            f"Exporting this model in {what} needs {disk:,} bytes of disk while it builds, and "
            f"{existing} has {free:,} bytes free. Free some space, choose a directory on another "
            "disk, or a smaller --precision."
        )
    available, memory = memory_available(), needed.host.memory_bytes
    if available is not None and available < memory:
        raise MistralcError(
            f"Exporting this model in {what} needs about {memory:,} bytes of memory, and "
            f"{available:,} bytes are available here. Stop other programs, export on a host with "
            "more memory, or choose a smaller --precision."
        )


def _verification_memory(spec: ModelSpec, weights: int) -> int:
    """Bytes of the PyTorch decoder in float32 and of the finished bundle, side by side."""
    reference = spec.num_parameters * ITEM_SIZE["float32"]
    logits = 2 * VERIFIED_ROWS * spec.vocab_size * ITEM_SIZE["float32"]
    packed_again = _embedding(spec) * ITEM_SIZE["float32"] if spec.tie_word_embeddings else 0
    return reference + round(SESSION_COPIES * weights) + packed_again + logits


def _embedding(spec: ModelSpec) -> int:
    return spec.vocab_size * spec.hidden_size
