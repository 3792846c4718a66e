"""The decoder in PyTorch, from token ids to logits. Knows nothing about checkpoints.

The decoder is written to be traced: ring slots, masks and rotary angles are arithmetic on
`position_ids`, so the host supplies nothing but the next position. Run eagerly, it is the reference
that `mistralc verify` compares a bundle with. Module names are those of Hugging Face, so that
`state_dict()` keys are checkpoint names.

There is one decoder. What families do differently is a value of `ModelSpec`, whose default is
Mistral's: a part that a model lacks is an identity here, and leaves no node in the graph.

All decoder mathematics is in this file. Calibration, which observes and replaces weights between
two linears, calls the stages by name instead of repeating them:

    x = embed(ids)
    each layer: heads, present = self_attn(attention_input(x));  x = add_attention(x, heads)
                gated = mlp(mlp_input(x));                       x = add_mlp(x, gated)
    logits(x)

Letters: B batch, S tokens, T logits wanted, C capacity, H query heads, K key/value heads,
D head size, E hidden, F feed-forward, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
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
from exporter.decoder.rotary import inverse_frequencies, query_scale
from graphs import window
from graphs.spec import Activation, ModelSpec

Caches = list[Tensor]  # past_key.0, past_value.0, past_key.1, … each [B, K, C, D]
CPU = torch.device("cpu")
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh"),
}  # fmt: skip


class Step(NamedTuple):
    """Rotary angles, ring slots and masks of one step, computed once for all layers."""

    cos: Tensor  # [B, S, R/2]
    sin: Tensor  # [B, S, R/2], R rotated features of a head
    write_indices: dict[int | None, Tensor]  # by window: the step's first slot, [B]
    masks: dict[int | None, Tensor]  # by window: the slots each token attends to, [B, 1, S, C]
    query_scale: Tensor | None  # [B, 1, S, 1], for queries that are scaled by their position


class RMSNorm(nn.Module):
    """Root-mean-square normalization with a learned gain."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last axis of x [..., E]; returns the same shape."""
        normal: Tensor = rms_norm(x, self.weight, self.epsilon)  # [..., E]
        return normal


class Attention(nn.Module):
    """Grouped-query attention over the ring, up to the input of `o_proj`."""

    def __init__(self, spec: ModelSpec, index: int) -> None:
        super().__init__()
        self.spec, self.window, self.rotates = spec, spec.layer_windows[index], spec.rotates(index)
        own = spec.attention
        q_size = spec.num_attention_heads * spec.head_dim
        kv_size = spec.num_key_value_heads * spec.head_dim
        self.q_proj = nn.Linear(spec.hidden_size, q_size, bias=own.bias)
        self.k_proj = nn.Linear(spec.hidden_size, kv_size, bias=own.bias)
        self.v_proj = nn.Linear(spec.hidden_size, kv_size, bias=own.bias)
        self.o_proj = nn.Linear(q_size, spec.hidden_size, bias=own.output_bias)
        if own.query_key_norms:
            self.q_norm = RMSNorm(spec.head_dim, spec.rms_norm_eps)
            self.k_norm = RMSNorm(spec.head_dim, spec.rms_norm_eps)

    def forward(self, x: Tensor, step: Step, past: Caches) -> tuple[Tensor, Caches]:
        """Write the keys and values of x [B, S, E] into the ring, then attend to the ring.

        Returns the heads' output [B, S, H * D], which `Layer.add_attention` projects, and the two
        updated caches.
        """
        spec, own = self.spec, self.spec.attention
        q = split_heads(self.q_proj(x), spec.head_dim)  # [B, H, S, D]
        k = split_heads(self.k_proj(x), spec.head_dim)  # [B, K, S, D]
        v = split_heads(self.v_proj(x), spec.head_dim)  # [B, K, S, D]
        if own.query_key_norms:
            q, k = self.q_norm(q), self.k_norm(k)  # [B, H, S, D], [B, K, S, D]
        if self.rotates:
            q = rotary_embedding(q, step.cos, step.sin)  # [B, H, S, D]
            k = rotary_embedding(k, step.cos, step.sin)  # [B, K, S, D]
        if step.query_scale is not None:
            q = q * step.query_scale  # [B, H, S, D]
        slot = step.write_indices[self.window]  # [B]
        key = tensor_scatter(past[0], k, slot)  # [B, K, C, D]
        value = tensor_scatter(past[1], v, slot)  # [B, K, C, D]
        mask = step.masks[self.window]  # [B, 1, S, C]
        heads = attention(q, key, value, mask, own.scale, own.softcap)  # [B, H, S, D]
        return merge_heads(heads), [key, value]


class FeedForward(nn.Module):
    """SwiGLU or GeGLU (Shazeer 2020, arXiv:2002.05202), up to the input of `down_proj`."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        e, f = spec.hidden_size, spec.intermediate_size
        self.gate_proj = nn.Linear(e, f, bias=spec.mlp_bias)
        self.up_proj = nn.Linear(e, f, bias=spec.mlp_bias)
        self.down_proj = nn.Linear(f, e, bias=spec.mlp_bias)
        self.activation = ACTIVATIONS[spec.activation]

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, S, E] to the gated product [B, S, F], which `Layer.add_mlp` projects."""
        gated: Tensor = self.activation(self.gate_proj(x)) * self.up_proj(x)  # [B, S, F]
        return gated


class Layer(nn.Module):
    """One decoder layer: attention, then feed-forward, each added to its input.

    The input of each is normalized, and with `post_norms` its result too. Modules have the names
    that Hugging Face gives them, so `post_attention_layernorm` is the norm before the feed-forward
    in Mistral and the one after attention in Gemma 2.
    """

    def __init__(self, spec: ModelSpec, index: int) -> None:
        super().__init__()
        self.post_norms, self.multiplier = spec.post_norms, spec.multipliers.residual
        norm = partial(RMSNorm, spec.hidden_size, spec.rms_norm_eps)
        self.input_layernorm = norm()
        self.self_attn = Attention(spec, index)
        self.post_attention_layernorm = norm()
        self.mlp = FeedForward(spec)
        if spec.post_norms:
            self.pre_feedforward_layernorm = norm()
            self.post_feedforward_layernorm = norm()

    def forward(self, x: Tensor, step: Step, past: Caches) -> tuple[Tensor, Caches]:
        """Run x [B, S, E] through the layer; returns the same shape and the two updated caches."""
        heads, present = self.self_attn(self.attention_input(x), step, past)  # [B, S, H * D]
        x = self.add_attention(x, heads)  # [B, S, E]
        gated = self.mlp(self.mlp_input(x))  # [B, S, F]
        return self.add_mlp(x, gated), present

    def attention_input(self, x: Tensor) -> Tensor:
        """Return what q_proj, k_proj and v_proj read, from the residual x; both [B, S, E]."""
        normal: Tensor = self.input_layernorm(x)  # [B, S, E]
        return normal

    def add_attention(self, x: Tensor, heads: Tensor) -> Tensor:
        """Project the heads' output [B, S, H * D] and add it to the residual x [B, S, E]."""
        result = self.self_attn.o_proj(heads)  # [B, S, E]
        if self.post_norms:
            result = self.post_attention_layernorm(result)  # [B, S, E]
        return x + _scaled(result, self.multiplier)  # [B, S, E]

    def mlp_input(self, x: Tensor) -> Tensor:
        """Return what gate_proj and up_proj read, from the residual x; both [B, S, E]."""
        before = (
            self.pre_feedforward_layernorm if self.post_norms else self.post_attention_layernorm
        )
        normal: Tensor = before(x)  # [B, S, E]
        return normal

    def add_mlp(self, x: Tensor, gated: Tensor) -> Tensor:
        """Project the gated product [B, S, F] and add it to the residual x [B, S, E]."""
        result = self.mlp.down_proj(gated)  # [B, S, E]
        if self.post_norms:
            result = self.post_feedforward_layernorm(result)  # [B, S, E]
        return x + _scaled(result, self.multiplier)  # [B, S, E]


class Backbone(nn.Module):
    """Embedding, layers and final norm: the module that Hugging Face calls `model`."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(Layer(spec, i) for i in range(spec.num_hidden_layers))
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)


class Decoder(nn.Module):
    """The whole model. `forward` is the graph contract of the bundle."""

    inv_freq: Tensor  # [R/2], float32

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.model = Backbone(spec)
        self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        self.register_buffer("inv_freq", inverse_frequencies(spec), persistent=False)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, logits_indices: Tensor, past: Caches
    ) -> tuple[Tensor, Caches]:
        """Run one step over ids and positions [B, S].

        Returns the logits [B, T, V] of the rows `logits_indices` [B, T] and the updated caches.
        """
        x = self.embed(input_ids)  # [B, S, E]
        step = self.prepare(position_ids, past, x.dtype)
        present: Caches = []
        for i, layer in enumerate(self.model.layers):
            x, written = layer(x, step, past[2 * i : 2 * i + 2])  # [B, S, E]
            present += written
        wanted = gather_rows(x, logits_indices)  # [B, T, E]
        return self.logits(wanted), present

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return the residual stream [B, S, E] that enters the first layer, from ids [B, S]."""
        x: Tensor = self.model.embed_tokens(input_ids)  # [B, S, E]
        return _scaled(x, self.spec.multipliers.embedding)  # [B, S, E]

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits [..., V] of rows of the last layer's output, x [..., E]."""
        scores: Tensor = self.lm_head(self.model.norm(x))  # [..., V]
        scores = _scaled(scores, self.spec.multipliers.logits)  # [..., V]
        cap = self.spec.logit_softcap
        return scores if cap is None else torch.tanh(scores / cap) * cap  # [..., V]

    def prepare(self, position_ids: Tensor, past: Caches, dtype: torch.dtype) -> Step:
        """Compute angles, slots and masks from position_ids [B, S], consecutive in each row."""
        first, last = position_ids.select(1, 0), position_ids.select(1, -1)  # [B]
        angles = position_ids.unsqueeze(-1).float() * self.inv_freq  # [B, S, R/2]
        factor = 1.0 if (scaling := self.spec.rope_scaling) is None else scaling.attention_factor
        # Positions get the mask's four axes before the comparison: TensorRT-RTX 1.7 fails to
        # compile (a duplicate "iota") if several layers share a mask that gets its axes later.
        queries = position_ids.unsqueeze(1).unsqueeze(-1)  # [B, 1, S, 1]
        write_indices, masks = {}, {}
        for size in self.spec.windows:
            capacity = past[2 * self.spec.layer_windows.index(size)].shape[2]  # C
            slots = torch.arange(capacity, device=position_ids.device)  # [C]
            keys = window.slot_position(last.view(-1, 1, 1, 1), slots, capacity)  # [B, 1, 1, C]
            masks[size] = window.visible(queries, keys, size)  # [B, 1, S, C]
            write_indices[size] = first % capacity  # [B]
        cos = _scaled(angles.cos(), factor).to(dtype)  # [B, S, R/2]
        sin = _scaled(angles.sin(), factor).to(dtype)  # [B, S, R/2]
        scale = None
        if self.spec.rope.query_scale:
            scale = query_scale(self.spec, position_ids).to(dtype)  # [B, 1, S, 1]
        return Step(cos, sin, write_indices, masks, scale)


def _scaled(x: Tensor, multiplier: float) -> Tensor:
    """Return x times a constant of the model; x itself if that is 1."""
    return x if multiplier == 1 else x * multiplier


def empty_caches(spec: ModelSpec, batch: int, capacity: int, device: torch.device = CPU) -> Caches:
    """Return caches [B, K, C, D] of zeros for every layer, all of the same capacity.

    They share one tensor: writing to a ring returns a copy. A ring as long as the text never wraps.
    """
    shape = (batch, spec.num_key_value_heads, capacity, spec.head_dim)
    return [torch.zeros(shape, device=device)] * (2 * spec.num_hidden_layers)


def logits_at(decoder: Decoder, ids: Tensor, rows: Tensor) -> Tensor:
    """Return the logits [..., T, V] at the positions `rows` [T] of the texts `ids` [..., n].

    All tokens run in one pass over a ring that never wraps, on the decoder's device; the logits are
    returned on the device of `ids`.
    """
    device, count = decoder.inv_freq.device, ids.shape[-1]
    batch = ids.reshape(-1, count).to(device)  # [B, n]
    past = empty_caches(decoder.spec, len(batch), count, device)
    positions = torch.arange(count, device=device).expand(len(batch), -1)  # [B, n]
    wanted = rows.to(device).expand(len(batch), -1)  # [B, T]
    with torch.inference_mode():
        logits, _ = decoder(batch, positions, wanted, past)  # [B, T, V]
    found: Tensor = logits.view(*ids.shape[:-1], *logits.shape[1:])  # [..., T, V]
    return found.to(ids.device)
