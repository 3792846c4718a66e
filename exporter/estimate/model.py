"""What a build needs: its size, its memory and its fastest decoding where it runs.

Arithmetic on a `Build`; opens no file. What making it takes is in `host.py`. GB is 10^9 bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from exporter.decide import NOTHING_KNOWN
from exporter.estimate.host import HostNeeds, host_needs
from exporter.quantization.policy import WeightFacts
from graphs.build import Build
from graphs.contract import GraphContract
from graphs.dtypes import item_size
from graphs.gpu_catalogue import Gpu, version
from runtime.bundle.sizes import weight_bytes

HIDDEN_TRAFFIC, INNER_TRAFFIC = 18, 10
"""How often a layer's kernels read or write a vector of size E, and of size F, while they decode:
audits of Mistral-7B and SmolLM2 counted 1.70 and 1.74 MB, and these give 1.80 and 1.64 MB."""

RUNTIME_RESERVE = 2**30
"""Bytes kept free for CUDA's context, kernels and driver. An allowance, not a measurement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What one build needs. Rings are full, for all rows."""

    build: Build
    weight_bytes: int
    host: HostNeeds

    @property
    def parameters(self) -> int:
        """Weights of the model."""
        return self.build.spec.num_parameters

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one position in all layers."""
        return self.build.contract.token_bytes

    @property
    def ring_bytes(self) -> int:
        """Bytes of the full ring of all rows."""
        return self.build.contract.ring_bytes

    @property
    def query_heads_per_group(self) -> int:
        """How many times larger the cache would be without grouped-query attention."""
        spec = self.build.spec
        return spec.num_attention_heads // spec.num_key_value_heads

    @property
    def kv_bytes_unwindowed(self) -> int:
        """Bytes of the cache of all rows without a window, at the longest trained length."""
        build = self.build
        tokens = build.ring.max_batch * build.spec.max_position_embeddings
        return tokens * self.kv_bytes_per_token

    @property
    def ring_slots(self) -> Mapping[int | None, int]:
        """Slots of the ring, by window."""
        return {size: self.build.ring.capacity(size) for size in self.build.spec.windows}

    @property
    def activation_parts(self) -> Mapping[str, int]:
        """Bytes of the candidates for the largest activation."""
        return activation_parts(self.build.contract)

    @property
    def activation_bytes(self) -> int:
        """The largest activation: the others are freed by then, or not yet allocated."""
        return max(self.activation_parts.values())

    @property
    def run_bytes(self) -> int:
        """Memory that running takes, apart from the runtime's own."""
        return self.weight_bytes + self.ring_bytes + self.activation_bytes

    @property
    def step_parts(self) -> Mapping[str, int]:
        """Bytes that decoding one token in every row reads and writes.

        These are the bytes of an audited engine: weights once, the ring once, a slot written,
        activations between the kernels, and what is moved without being computed.
        """
        build, spec = self.build, self.build.spec
        # A decode step reads one row of the embedding, unless the output layer is the embedding.
        embedding = spec.vocab_size * spec.hidden_size * item_size(build.activation)
        unread = 0 if spec.tie_word_embeddings else embedding
        rows = build.ring.max_batch
        values = spec.vocab_size + spec.num_hidden_layers * (
            HIDDEN_TRAFFIC * spec.hidden_size + INNER_TRAFFIC * spec.intermediate_size
        )
        # An engine that cannot read its ring in place writes a copy and reads that.
        copies = 2 if build.target.holds_plan and not build.decodes_apart else 0
        return {
            "weights": self.weight_bytes - unread,
            "ring": self.ring_bytes + rows * self.kv_bytes_per_token,
            "activations": rows * values * item_size(build.activation),
            "moved": copies * self.ring_bytes,
        }

    @property
    def step_bytes(self) -> int:
        """All bytes that decoding one token in every row reads and writes."""
        return sum(self.step_parts.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How a build fits one GPU. `refusal` says why it cannot run there at any size."""

    estimate: Estimate
    gpu: Gpu
    left_bytes: int  # negative if memory is missing
    tokens_per_s: float  # of all rows together, at most: what memory bandwidth allows
    refusal: str | None

    @property
    def fits(self) -> bool:
        """Whether it runs there."""
        return self.left_bytes >= 0 and self.refusal is None


def estimate(build: Build, facts: WeightFacts = NOTHING_KNOWN) -> Estimate:
    """Work out what a build of a checkpoint with such weights needs to be made and to run."""
    weights = sum(weight_bytes(build.spec, build.storage, build.activation).values())
    return Estimate(build=build, weight_bytes=weights, host=host_needs(build, facts))


def activation_parts(contract: GraphContract) -> dict[str, int]:
    """Bytes of the candidates for the largest activation, for S = chunk tokens in B rows.

    The scores are an upper bound: a fused attention, such as TensorRT's, never stores them.
    """
    spec, ring, item = contract.spec, contract.ring, item_size(contract.activation)
    rows, tokens = ring.max_batch, ring.max_batch * ring.chunk
    slots = list(contract.capacities.values())
    return {
        "logits": rows * spec.vocab_size * item,  # [B, 1, V]
        "mlp": 2 * tokens * spec.intermediate_size * item,  # gate and up, [B, S, F] each
        "attention": tokens * sum(slots)  # a mask for each window, [B, 1, S, C], one byte each
        + tokens * spec.num_attention_heads * max(slots) * item,  # scores [B, H, S, C]
    }


def fit(needed: Estimate, gpu: Gpu) -> Fit:
    """Compare an estimate with a GPU's memory and bandwidth."""
    build = needed.build
    target, least = build.target, build.precision.min_compute_capability
    refusal = None
    if not target.supports(gpu.compute_capability):
        refusal = (
            f"{target.title} does not support compute capability {gpu.compute_capability}; use "
            f"--target {target.alternative}"
        )
    elif least is not None and version(gpu.compute_capability) < least:
        refusal = (
            f"{build.precision.name.upper()} needs compute capability "
            f"{'.'.join(map(str, least))} or later; use --precision int8"
        )
    steps_per_s = gpu.bandwidth_bytes_per_s / needed.step_bytes
    return Fit(
        estimate=needed,
        gpu=gpu,
        left_bytes=gpu.memory_bytes - RUNTIME_RESERVE - needed.run_bytes,
        tokens_per_s=build.ring.max_batch * steps_per_s,
        refusal=refusal,
    )
