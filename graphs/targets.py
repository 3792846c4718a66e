"""Targets: what `--target` may name, and everything that follows from the choice.

Standard library only. Nothing outside this file, the pass tuples (`graphs/passes/pipeline.py`) and
the sessions' factory (`runtime/load.py`) may ask for a target by name: it asks for a fact of the
target instead. To add one: an entry here, its passes, and its session; both tables are compared
with this one when they are imported. See `docs/extending.md`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from graphs.dtypes import Dtype
from graphs.errors import UsageError
from graphs.precisions import PRECISIONS

CodeLayout = Literal["onnx", "transposed", "nbits"]
"""How a quantized weight's codes lie in the file: see `graphs.quant_scheme.stored_parts`."""

AttentionForm = Literal["masked", "grouped", "folded", "unfused", "in_place"]
"""How the attention of a layer is computed: see `graphs.attention_form`."""

GRAPH_FILES = ("model.onnx", "weights.safetensors")
PLAN_FILES = ("engine.plan",)

MAX_IN_PLACE_SLOTS = 24_000
"""TensorRT-RTX 1.7 has a kernel for one token up to rings of about 24,256 slots; a larger one fails
to build with "not supported by a dedicated kernel"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What runs a bundle, and what follows from that.

    `activations` maps each precision that the target is built in to the type that its graph
    computes in, the default first. The name is also that of the extra that installs the backend.
    """

    name: str
    title: str
    activations: Mapping[str, Dtype] = field(hash=False)  # a dict has no hash; the name has one

    # The backend, as the production host sees it.
    backend_module: str  # what the session imports
    distributions: tuple[str, ...]  # packages that provide it, the one we ask for first
    min_backend_version: tuple[int, ...] = ()
    execution_provider: str | None = None  # that ONNX Runtime has to offer
    on_gpu: bool = True
    compute_capabilities: tuple[str, ...] | None = None  # "12.x" is all of 12; None: any
    alternative: str | None = None  # the target for a GPU that this one does not support
    narrows_gpus: bool = False  # a plan may be built for some GPUs only (`--gpu`)
    kernel_timings: bool = False  # the builder keeps timings between builds
    compiles_kernels_at_load: bool = False  # and captures CUDA graphs by itself

    # The bundle.
    loaded_files: tuple[str, ...]
    holds_plan: bool = False

    # Attention: the form for layers without a window, and for layers with one.
    full_attention: AttentionForm = "masked"
    windowed_attention: AttentionForm = "masked"
    max_in_place_slots: int = 0  # of a ring that the form `in_place` can read
    caps_scores: bool = True  # its `Attention` takes a soft cap of the scores

    # The ring.
    ring_grows: bool = False  # else it is full from the start, and its capacity fixed in the graph
    min_chunk: int = 1
    largest_default_chunk: int = 512

    # Quantized weights.
    weight_only_layout: CodeLayout = "onnx"
    rounded_integer_layout: CodeLayout = "onnx"
    default_block: int | None = None  # input features that share a scale, blockwise precisions
    always_blockwise: bool = False  # one scale per row is not supported for weights alone
    rounds_blocks: bool = False  # `MatMulNBits` rounds blocks of its input to int8
    zero_points: bool = False
    partial_blocks: bool = False  # the block need not divide the input features
    quantizes_tied_embedding: bool = False
    weight_only_float8: bool = False  # float8 weights beside inputs that are not rounded
    float8_blocks: bool = False  # and their scales may be for blocks, not only for rows
    quantizes_calibrated_head: bool = False  # the output layer, where inputs are rounded
    supports_batch_invariance: bool = False

    @property
    def verified_at_export(self) -> bool:
        """Whether the build host can run the bundle: targets with a GPU are verified there."""
        return not self.on_gpu

    @property
    def default_precision(self) -> str:
        """The precision for a checkpoint whose own type is not one of the target's."""
        return next(iter(self.activations))

    def activation(self, precision: str) -> Dtype:
        """What the graph computes in. Raises UsageError if the target has no such precision."""
        if precision not in self.activations:
            raise UsageError(
                f"--precision is {precision!r}; the target {self.name} takes "
                f"{', '.join(self.activations)}. Choose one of them, or another --target."
            )
        return self.activations[precision]

    def precision_for(self, stored: frozenset[str]) -> str:
        """The default precision for weights of these types: the one that loses no bit, if any."""
        if len(stored) == 1:
            for name in self.activations:
                if PRECISIONS[name].lossless_for in stored:
                    return name
        return self.default_precision

    def supports(self, compute_capability: str) -> bool:
        """Whether a GPU of this compute capability, such as "8.9", can run it."""
        if self.compute_capabilities is None:
            return True
        family = compute_capability.partition(".")[0] + ".x"
        return bool({compute_capability, family} & set(self.compute_capabilities))


def _quantized(activation: Dtype) -> dict[str, Dtype]:
    return {name: activation for name, one in PRECISIONS.items() if one.quantized}


def _weight_only(activation: Dtype) -> dict[str, Dtype]:
    return {name: activation for name, one in PRECISIONS.items() if one.weight_only}


_HALF: dict[str, Dtype] = {"fp16": "float16", "bf16": "bfloat16"}

TARGETS: Mapping[str, Target] = {
    one.name: one
    for one in (
        Target(
            name="cpu",
            title="ONNX Runtime CPU",
            activations={"fp32": "float32", **_quantized("float32")},
            backend_module="onnxruntime",
            distributions=("onnxruntime", "onnxruntime-gpu"),
            min_backend_version=(1, 31),  # the graph is of opset 24
            on_gpu=False,
            loaded_files=GRAPH_FILES,
            full_attention="grouped",
            ring_grows=True,
            # Reads a prompt of 512 tokens 5 to 10% faster than one chunk of 512 does.
            largest_default_chunk=256,
            weight_only_layout="nbits",
            rounded_integer_layout="transposed",
            default_block=32,
            always_blockwise=True,
            rounds_blocks=True,
            zero_points=True,
            partial_blocks=True,
            quantizes_tied_embedding=True,
            weight_only_float8=True,
            float8_blocks=True,
            quantizes_calibrated_head=True,
            supports_batch_invariance=True,
        ),
        Target(
            name="cuda",
            title="ONNX Runtime CUDA",
            activations={**_HALF, **_weight_only("float16")},
            backend_module="onnxruntime",
            distributions=("onnxruntime-gpu", "onnxruntime"),
            min_backend_version=(1, 31),
            execution_provider="CUDAExecutionProvider",
            loaded_files=GRAPH_FILES,
            full_attention="grouped",
            windowed_attention="folded",
            weight_only_layout="nbits",
            # ONNX Runtime's fastest kernels: blocks of 32 without zero points.
            default_block=32,
            always_blockwise=True,
            quantizes_tied_embedding=True,
        ),
        Target(
            name="rtx",
            title="TensorRT-RTX",
            activations={**_HALF, **_quantized("float16")},
            backend_module="tensorrt_rtx",
            distributions=("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
            # What a TensorRT-RTX 1.7 plan runs on when its compute capability is left unset.
            compute_capabilities=("7.5", "8.0", "8.6", "8.9", "12.x"),
            alternative="tensorrt",
            narrows_gpus=True,
            compiles_kernels_at_load=True,
            loaded_files=PLAN_FILES,
            holds_plan=True,
            full_attention="in_place",
            windowed_attention="in_place",
            max_in_place_slots=MAX_IN_PLACE_SLOTS,
            caps_scores=False,  # "Setting softcap is not supported in TensorRT Attention."
            min_chunk=64,  # shorter steps: a duplicate "iota", or no attention kernel
            weight_only_layout="transposed",
            weight_only_float8=True,
            default_block=128,
        ),
        Target(
            name="tensorrt",
            title="TensorRT",
            activations={**_HALF, **_quantized("float16")},
            backend_module="tensorrt",
            distributions=("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
            kernel_timings=True,
            loaded_files=PLAN_FILES,
            holds_plan=True,
            full_attention="in_place",
            windowed_attention="in_place",
            max_in_place_slots=MAX_IN_PLACE_SLOTS,
            caps_scores=False,  # "Setting softcap is not supported in TensorRT Attention."
            min_chunk=64,
            weight_only_layout="transposed",
            weight_only_float8=True,
            default_block=128,
        ),
    )
}
"""By the name that `--target` takes."""

DEFAULT_TARGET = next(iter(TARGETS))


def target_named(name: str) -> Target:
    """Look a target up. Raises UsageError that lists the targets there are."""
    if name not in TARGETS:
        raise UsageError(f"--target is {name!r}; expected one of {', '.join(TARGETS)}.")
    return TARGETS[name]


def target_for_gpu(compute_capability: str) -> Target:
    """The target that `plan` assumes for a GPU: the first with a plan that supports it."""
    plans = (one for one in TARGETS.values() if one.holds_plan)
    return next(one for one in plans if one.supports(compute_capability))


def backend_distributions() -> tuple[str, ...]:
    """Every package that provides a backend, once."""
    names = (name for one in TARGETS.values() for name in one.distributions)
    return tuple(dict.fromkeys(names))


def require_entry_per_target(table: Mapping[str, object], where: str) -> None:
    """Raise ValueError unless `table` has exactly one entry for each target.

    Called when a module with such a table is imported, so that a target which is missing from one
    is found at once and not by the first user of that target.
    """
    if table.keys() != TARGETS.keys():
        different = ", ".join(sorted(table.keys() ^ TARGETS.keys()))
        raise ValueError(f"{where} and graphs.targets.TARGETS differ in {different}")


def _check_precisions() -> None:
    for target in TARGETS.values():
        unknown = target.activations.keys() - PRECISIONS.keys()
        if unknown or not target.activations:
            raise ValueError(f"target {target.name} has precisions {sorted(unknown)} of no table")
    unused = PRECISIONS.keys() - {name for one in TARGETS.values() for name in one.activations}
    if unused:
        raise ValueError(f"no target is built in {sorted(unused)}")


_check_precisions()
