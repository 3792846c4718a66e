"""The graph contract: what a bundle's graph takes and returns, and at which sizes.

`GraphContract` is the trio that sessions, device buffers, the engine builder and the audit need
together: the model, its ring, and the type that the graph computes in. Standard library only.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from graphs.dtypes import Dtype, item_size
from graphs.spec import ModelSpec, RingSpec

Dim = int | str
"""A fixed size, or the letter of a dynamic dimension."""

PADDED = 1
"""Rows by which a batch-invariant graph pads its queries (`passes/onnxruntime/pad_query.py`)."""

STEP_INPUTS = ("input_ids", "position_ids", "logits_indices")
"""The inputs that change with every step; all others are the ring."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One input or output. A string in `shape` is the letter of a dynamic dimension."""

    name: str
    shape: tuple[Dim, ...]
    dtype: Dtype

    def sized(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with letters replaced by `sizes`; a letter without a size becomes -1."""
        return tuple(sizes.get(dim, -1) if isinstance(dim, str) else dim for dim in self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphContract:
    """A model, its ring, and the type that its graph computes in (`activation`)."""

    spec: ModelSpec
    ring: RingSpec
    activation: Dtype

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The graph's inputs, in order."""
        return graph_inputs(self.spec, self.activation)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The graph's outputs, in order."""
        return graph_outputs(self.spec, self.activation)

    @property
    def capacities(self) -> dict[str, int]:
        """C of the full ring, by dimension letter."""
        spec = self.spec
        return {capacity_letter(spec, size): self.ring.capacity(size) for size in spec.windows}

    @property
    def ring_bytes(self) -> int:
        """Bytes of the full ring, all rows and layers: constant however long a text runs."""
        slots = sum(self.ring.capacity(size) for size in self.spec.layer_windows)
        return self.ring.max_batch * slots * self.slot_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values that one position takes in all layers together: 2 L K D."""
        return self.slot_bytes * self.spec.num_hidden_layers

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot's key and value in one layer: 2 K D."""
        values = 2 * self.spec.num_key_value_heads * self.spec.head_dim
        return values * item_size(self.activation)

    def sizes(self, *, batch: int, tokens: int, wanted: int) -> dict[str, int]:
        """Every letter as a number for one step: B, S, T, and each C of the full ring."""
        return {"B": batch, "S": tokens, "T": wanted, **self.capacities}


def capacity_letter(spec: ModelSpec, window_size: int | None) -> str:
    """Name of the dimension C: `C` if all layers share one window, otherwise one per window."""
    if len(spec.windows) == 1:
        return "C"
    return "C_full" if window_size is None else f"C_{window_size}"


def graph_inputs(spec: ModelSpec, activation: Dtype) -> tuple[TensorSpec, ...]:
    """The graph's inputs, in order; they do not depend on the ring's size."""
    return (
        TensorSpec(name="input_ids", shape=("B", "S"), dtype="int64"),
        TensorSpec(name="position_ids", shape=("B", "S"), dtype="int64"),
        TensorSpec(name="logits_indices", shape=("B", "T"), dtype="int64"),
        *_caches(spec, activation, "past"),
    )


def graph_outputs(spec: ModelSpec, activation: Dtype) -> tuple[TensorSpec, ...]:
    """The graph's outputs, in order; they do not depend on the ring's size."""
    logits = TensorSpec(name="logits", shape=("B", "T", spec.vocab_size), dtype=activation)
    return (logits, *_caches(spec, activation, "present"))


def _caches(spec: ModelSpec, activation: Dtype, prefix: str) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            name=f"{prefix}_{kind}.{i}",
            shape=("B", spec.num_key_value_heads, capacity_letter(spec, size), spec.head_dim),
            dtype=activation,
        )
        for i, size in enumerate(spec.layer_windows)
        for kind in ("key", "value")
    )
