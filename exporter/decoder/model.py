"""The Mistral decoder in PyTorch, from token ids to logits. Knows nothing about checkpoints.

It is written to be traced: the ring, the window and the rotary angles are arithmetic on
`position_ids`, so the graph needs nothing from its host but the next position. Run eagerly it is
the reference that `mistralc verify` compares a bundle with. Module names are Hugging Face's, so
that `state_dict()` keys are checkpoint names.

Letters: B batch, S tokens, T logits wanted, C capacity, H query heads, K key/value heads,
D head size, E hidden, F feed-forward, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporter.decoder.operators import (
    attention,
    gather_rows,
    merge_heads,
    rms_norm,
    rotary_embedding,
    split_heads,
    tensor_scatter,
)
from graphs import window
from graphs.spec import ModelSpec, RopeScaling

Caches = list[Tensor]  # past_key.0, past_value.0, past_key.1, … each [B, K, C, D]


class Step(NamedTuple):
    """What every layer needs of the step, computed once."""

    cos: Tensor  # [B, S, D/2]
    sin: Tensor  # [B, S, D/2]
    write_indices: dict[int | None, Tensor]  # by window: the step's first slot, [B]
    masks: dict[int | None, Tensor]  # by window: which slots each token sees, [B, 1, S, C]


class RMSNorm(nn.Module):
    """Root-mean-square normalization with a learned gain."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last axis of x [B, S, E]."""
        normal: Tensor = rms_norm(x, self.weight, self.epsilon)
        return normal


class Attention(nn.Module):
    """Grouped-query attention over the ring: written first, then attended."""

    def __init__(self, spec: ModelSpec, window_size: int | None) -> None:
        super().__init__()
        self.head_dim, self.window = spec.head_dim, window_size
        q_size = spec.num_attention_heads * spec.head_dim
        kv_size = spec.num_key_value_heads * spec.head_dim
        self.q_proj = nn.Linear(spec.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(spec.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(spec.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, spec.hidden_size, bias=False)

    def forward(self, x: Tensor, step: Step, past: Caches) -> tuple[Tensor, Caches]:
        """Attend from x [B, S, E]; returns the same shape and the two caches as written."""
        seen, present = self.heads(x, step, past)
        return self.o_proj(seen), present

    def heads(self, x: Tensor, step: Step, past: Caches) -> tuple[Tensor, Caches]:
        """Attend from x [B, S, E]; returns what the heads saw, [B, S, H * D], and the caches."""
        q = split_heads(self.q_proj(x), self.head_dim)  # [B, H, S, D]
        k = split_heads(self.k_proj(x), self.head_dim)  # [B, K, S, D]
        v = split_heads(self.v_proj(x), self.head_dim)  # [B, K, S, D]
        q = rotary_embedding(q, step.cos, step.sin)
        k = rotary_embedding(k, step.cos, step.sin)
        slot = step.write_indices[self.window]  # [B]
        key = tensor_scatter(past[0], k, slot)  # [B, K, C, D]
        value = tensor_scatter(past[1], v, slot)  # [B, K, C, D]
        seen = attention(q, key, value, step.masks[self.window])  # [B, H, S, D]
        return merge_heads(seen), [key, value]


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.up_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.down_proj = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, S, E] through F and back."""
        out: Tensor = self.down_proj(self.gated(x))
        return out

    def gated(self, x: Tensor) -> Tensor:
        """Map x [B, S, E] to what `down_proj` reads, [B, S, F]."""
        product: Tensor = F.silu(self.gate_proj(x)) * self.up_proj(x)
        return product


class Layer(nn.Module):
    """One decoder layer: attention and feed-forward, each normalized before and added after."""

    def __init__(self, spec: ModelSpec, window_size: int | None) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.self_attn = Attention(spec, window_size)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.mlp = FeedForward(spec)

    def forward(self, x: Tensor, step: Step, past: Caches) -> tuple[Tensor, Caches]:
        """Run x [B, S, E] through the layer; returns the same shape and the two caches."""
        attended, present = self.self_attn(self.input_layernorm(x), step, past)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), present


class Backbone(nn.Module):
    """The part that Hugging Face calls `model`: embedding, layers, last norm."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(Layer(spec, size) for size in spec.layer_windows)
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)


class Decoder(nn.Module):
    """The whole model. `forward` is the graph contract of the bundle."""

    inv_freq: Tensor  # [D/2], float32

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.model = Backbone(spec)
        self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        self.register_buffer("inv_freq", inverse_frequencies(spec), persistent=False)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, logits_indices: Tensor, past: Caches
    ) -> tuple[Tensor, Caches]:
        """Take one step: ids and positions [B, S], wanted rows [B, T]; logits [B, T, V]."""
        x = self.model.embed_tokens(input_ids)  # [B, S, E]
        step = self.prepare(position_ids, past, x.dtype)
        present: Caches = []
        for i, layer in enumerate(self.model.layers):
            x, written = layer(x, step, past[2 * i : 2 * i + 2])
            present += written
        wanted = gather_rows(x, logits_indices)  # [B, T, E]
        return self.lm_head(self.model.norm(wanted)), present

    def prepare(self, position_ids: Tensor, past: Caches, dtype: torch.dtype) -> Step:
        """Rotary angles, ring slots and masks from position_ids [B, S], consecutive in a row."""
        first, last = position_ids.select(1, 0), position_ids.select(1, -1)  # [B]
        angles = position_ids.unsqueeze(-1).float() * self.inv_freq  # [B, S, D/2]
        # Positions take the mask's four axes before they are compared: TensorRT-RTX 1.7 fails to
        # compile (a duplicate "iota") when several layers share a mask that got its axes later.
        queries = position_ids.unsqueeze(1).unsqueeze(-1)  # [B, 1, S, 1]
        write_indices, masks = {}, {}
        for size in self.spec.windows:
            capacity = past[2 * self.spec.layer_windows.index(size)].shape[2]  # C
            slots = torch.arange(capacity, device=position_ids.device)  # [C]
            keys = window.slot_position(last.view(-1, 1, 1, 1), slots, capacity)  # [B, 1, 1, C]
            masks[size] = window.visible(queries, keys, size)  # [B, 1, S, C]
            write_indices[size] = first % capacity  # [B]
        return Step(angles.cos().to(dtype), angles.sin().to(dtype), write_indices, masks)


def inverse_frequencies(spec: ModelSpec) -> Tensor:
    """How far each pair of a head turns per position, in radians: [D/2], float32.

    theta^(-2i/D) (Su et al. 2021, arXiv:2104.09864), stretched as the checkpoint says. Computed
    in float32 as Hugging Face does: one unit in the last place is a visible angle at position
    20,000.
    """
    exponents = torch.arange(0, spec.head_dim, 2).float() / spec.head_dim
    frequencies = 1.0 / spec.rope_theta**exponents
    scaling = spec.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    return _llama3(frequencies, scaling)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's blend: long wavelengths divided by `factor`, short ones kept."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


class StoredLinear(nn.Module):
    """A linear layer in float32 whose weight stays as it is stored, mapped from a file, say."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight  # [N, K] of any float type

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x [..., K], converting a block of the weight's rows at a time."""
        blocks = self.weight.split(max(1, STORED_BLOCK // self.weight.shape[1]))
        return torch.cat([F.linear(x, rows.float()) for rows in blocks], dim=-1)


class StoredEmbedding(StoredLinear):
    """An embedding that is stored likewise."""

    def forward(self, x: Tensor) -> Tensor:
        """Look up x [B, S]; returns float32."""
        return F.embedding(x, self.weight).float()


STORED_BLOCK = 1 << 24  # numbers converted at once: 64 MiB in float32


def load_decoder(spec: ModelSpec, weight: Callable[[str], Tensor]) -> Decoder:
    """Build the reference: float32 arithmetic on the weights that `weight(name)` returns.

    Weights that are mapped from a checkpoint stay in it, so a 7B runs in a few hundred megabytes.
    """
    with torch.device("meta"):
        decoder = Decoder(spec)
    head = "model.embed_tokens" if spec.tie_word_embeddings else "lm_head"
    for name, module in list(decoder.named_modules()):
        if isinstance(module, nn.Linear):
            stored = weight(f"{head if name == 'lm_head' else name}.weight")
            decoder.set_submodule(name, StoredLinear(stored))
        elif isinstance(module, nn.Embedding):
            decoder.set_submodule(name, StoredEmbedding(weight(f"{name}.weight")))
        elif isinstance(module, RMSNorm):
            module.weight = nn.Parameter(weight(f"{name}.weight").float(), requires_grad=False)
    decoder.inv_freq = inverse_frequencies(spec)
    return decoder.eval()


def logits_at(decoder: Decoder, ids: Tensor, rows: Tensor) -> Tensor:
    """Run texts `ids` [..., n] in one pass, with a ring that never wraps.

    Returns the logits [..., T, V] at the positions `rows` [T] of each.
    """
    spec, count = decoder.spec, ids.shape[-1]
    batch = ids.reshape(-1, count)  # [B, n]
    shape = (len(batch), spec.num_key_value_heads, count, spec.head_dim)
    past = [torch.zeros(shape) for _ in range(2 * spec.num_hidden_layers)]
    positions, wanted = (part.expand(len(batch), -1) for part in (torch.arange(count), rows))
    with torch.inference_mode():
        logits, _ = decoder(batch, positions, wanted, past)
    found: Tensor = logits.view(*ids.shape[:-1], *logits.shape[1:])
    return found
