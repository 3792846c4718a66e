"""The Mistral decoder in PyTorch, from token ids to logits. Knows nothing about checkpoints.

The decoder is written to be traced: ring slots, masks and rotary angles are arithmetic on
`position_ids`, so the host supplies nothing but the next position. Run eagerly, it is the reference
that `mistralc verify` compares a bundle with. Module names are those of Hugging Face, so that
`state_dict()` keys are checkpoint names.

All decoder mathematics is in this file. Calibration, which observes and replaces weights between
two linears, calls the stages by name instead of repeating them:

    x = embed(ids)
    each layer: heads, present = self_attn(attention_input(x));  x = add_attention(x, heads)
                gated = mlp(mlp_input(x));                       x = add_mlp(x, gated)
    logits(x)

Letters: B batch, S tokens, T logits wanted, C capacity, H query heads, K key/value heads,
D head size, E hidden, F feed-forward, V vocabulary.
"""

import math
from collections.abc import Callable, Container
from functools import cache, partial
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
CPU = torch.device("cpu")
STORED_BLOCK = 1 << 22
"""Weights converted at once: 16 MiB in float32 come from the heap again; 64 MiB are mapped anew."""
KEPT_WEIGHTS = 500_000_000  # of a model whose decoded weights are kept in memory: 2 GB in float32


class Step(NamedTuple):
    """Rotary angles, ring slots and masks of one step, computed once for all layers."""

    cos: Tensor  # [B, S, D/2]
    sin: Tensor  # [B, S, D/2]
    write_indices: dict[int | None, Tensor]  # by window: the step's first slot, [B]
    masks: dict[int | None, Tensor]  # by window: the slots each token attends to, [B, 1, S, C]


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
        """Write the keys and values of x [B, S, E] into the ring, then attend to the ring.

        Returns the heads' output [B, S, H * D], which `Layer.add_attention` projects, and the two
        updated caches.
        """
        q = split_heads(self.q_proj(x), self.head_dim)  # [B, H, S, D]
        k = split_heads(self.k_proj(x), self.head_dim)  # [B, K, S, D]
        v = split_heads(self.v_proj(x), self.head_dim)  # [B, K, S, D]
        q = rotary_embedding(q, step.cos, step.sin)  # [B, H, S, D]
        k = rotary_embedding(k, step.cos, step.sin)  # [B, K, S, D]
        slot = step.write_indices[self.window]  # [B]
        key = tensor_scatter(past[0], k, slot)  # [B, K, C, D]
        value = tensor_scatter(past[1], v, slot)  # [B, K, C, D]
        heads = attention(q, key, value, step.masks[self.window])  # [B, H, S, D]
        return merge_heads(heads), [key, value]


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202), up to the input of `down_proj`."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.up_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.down_proj = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, S, E] to the gated product [B, S, F], which `Layer.add_mlp` projects."""
        gated: Tensor = F.silu(self.gate_proj(x)) * self.up_proj(x)  # [B, S, F]
        return gated


class Layer(nn.Module):
    """One decoder layer, pre-norm: attention, then feed-forward, each added to its input."""

    def __init__(self, spec: ModelSpec, window_size: int | None) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.self_attn = Attention(spec, window_size)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.mlp = FeedForward(spec)

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
        added: Tensor = x + self.self_attn.o_proj(heads)  # [B, S, E]
        return added

    def mlp_input(self, x: Tensor) -> Tensor:
        """Return what gate_proj and up_proj read, from the residual x; both [B, S, E]."""
        normal: Tensor = self.post_attention_layernorm(x)  # [B, S, E]
        return normal

    def add_mlp(self, x: Tensor, gated: Tensor) -> Tensor:
        """Project the gated product [B, S, F] and add it to the residual x [B, S, E]."""
        added: Tensor = x + self.mlp.down_proj(gated)  # [B, S, E]
        return added


class Backbone(nn.Module):
    """Embedding, layers and final norm: the module that Hugging Face calls `model`."""

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
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits [..., V] of rows of the last layer's output, x [..., E]."""
        scores: Tensor = self.lm_head(self.model.norm(x))  # [..., V]
        return scores

    def prepare(self, position_ids: Tensor, past: Caches, dtype: torch.dtype) -> Step:
        """Compute angles, slots and masks from position_ids [B, S], consecutive in each row."""
        first, last = position_ids.select(1, 0), position_ids.select(1, -1)  # [B]
        angles = position_ids.unsqueeze(-1).float() * self.inv_freq  # [B, S, D/2]
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
        return Step(angles.cos().to(dtype), angles.sin().to(dtype), write_indices, masks)


def inverse_frequencies(spec: ModelSpec) -> Tensor:
    """Return the rotation of each pair of features per position, in radians: [D/2], float32.

    theta^(-2i/D) (Su et al. 2021, arXiv:2104.09864), with the checkpoint's scaling. Computed in
    float32 as in Hugging Face transformers: a difference of one unit in the last place grows to a
    measurable angle at position 20,000.
    """
    exponents = torch.arange(0, spec.head_dim, 2).float() / spec.head_dim  # [D/2]
    frequencies = 1.0 / spec.rope_theta**exponents  # [D/2]
    scaling = spec.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    return _llama3(frequencies, scaling)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Divide low frequencies by `factor`, keep high ones, blend in between (Llama 3.1)."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # [D/2]
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # [D/2]
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


class StoredLinear(nn.Module):
    """A float32 linear that reads and converts its weight on every call.

    `read` returns the weight [N, K] of any float type, which may be a mapped file.
    """

    def __init__(self, read: Callable[[], Tensor]) -> None:
        super().__init__()
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x [..., K], converting some rows of the weight at a time; returns [..., N]."""
        weight = self.read()
        blocks = weight.split(max(1, STORED_BLOCK // weight.shape[1]))
        parts = [F.linear(x, rows.to(x.device, torch.float32)) for rows in blocks]
        return torch.cat(parts, dim=-1)


class StoredEmbedding(StoredLinear):
    """An embedding whose weight is read like that of `StoredLinear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Look up x [B, S]; returns [B, S, E] in float32."""
        weight = self.read()
        return F.embedding(x.to(weight.device), weight).to(x.device, torch.float32)


def reader(spec: ModelSpec, weight: Callable[[str], Tensor], name: str) -> Callable[[], Tensor]:
    """Return what reads one weight: once if the model is small, else anew on every call.

    Mapped weights cost nothing either way. A GGUF file's are decoded to float32, which for a 7B is
    29 GB: decoded on every call, only one of them is in memory at a time.
    """
    read = partial(weight, name)
    return cache(read) if spec.num_parameters <= KEPT_WEIGHTS else read


def load_decoder(
    spec: ModelSpec,
    weight: Callable[[str], Tensor],
    *,
    only: Container[str] | None = None,
    device: torch.device = CPU,
) -> Decoder:
    """Build the reference decoder: float32 arithmetic on the weights `weight(canonical name)`.

    Weights mapped from a checkpoint stay mapped, so a 7B runs in a few hundred megabytes. With
    `only`, just the modules of these names, such as `lm_head`, get their weights, for callers that
    use single stages; `prepare` needs none. Norms and rotary frequencies are on `device`.
    """
    with torch.device("meta"):
        decoder = Decoder(spec)
    head = "model.embed_tokens" if spec.tie_word_embeddings else "lm_head"
    read = cache(partial(reader, spec, weight))  # a tied embedding is read once
    for name, module in list(decoder.named_modules()):
        if only is not None and name not in only:
            continue
        if isinstance(module, nn.Linear):
            stored = f"{head if name == 'lm_head' else name}.weight"
            decoder.set_submodule(name, StoredLinear(read(stored)))
        elif isinstance(module, nn.Embedding):
            decoder.set_submodule(name, StoredEmbedding(read(f"{name}.weight")))
        elif isinstance(module, RMSNorm):
            gain = weight(f"{name}.weight").to(device, torch.float32)
            module.weight = nn.Parameter(gain, requires_grad=False)
    decoder.inv_freq = inverse_frequencies(spec).to(device)
    return decoder.eval()


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
