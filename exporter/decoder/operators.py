"""PyTorch operators for the ONNX operators that the decoder uses. Knows nothing about models.

Each operator has three parts: an eager implementation, so that the decoder is its own reference;
the output shape for tracing; and the ONNX node it is exported as. Semantics follow the ONNX
operator specification, opset 24.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from onnxscript.onnx_opset import opset24
from torch import Tensor

op: Any = opset24  # typed for ONNX script functions, which these are not

HEADS = [0, 2, 1, 3]  # the permutation between [B, S, heads, D] and [B, heads, S, D]

# Tensor lines carry their shape in the letters of graphs/spec.py.


@torch.library.custom_op("mistralc::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`RMSNormalization` over the last axis, accumulated in float32 (Zhang & Sennrich 2019)."""
    wide = x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return normal.to(x.dtype) * weight


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:  # noqa: ARG001
    return torch.empty_like(x)


@torch.library.custom_op("mistralc::rotary_embedding", mutates_args=())
def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`RotaryEmbedding`: rotate x [B, heads, S, D] by angles [B, S, R/2], half-split layout.

    Only the first R features of a head are rotated.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # [B, 1, S, R/2]
    half = cos.shape[-1]
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((cos * first - sin * second, sin * first + cos * second, rest), dim=-1)


@rotary_embedding.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("mistralc::tensor_scatter", mutates_args=())
def tensor_scatter(past: Tensor, update: Tensor, write_indices: Tensor) -> Tensor:
    """`TensorScatter`, mode linear: copy `past` [B,K,C,D] with `update` [B,K,S,D] at slot [B]."""
    slots = write_indices[:, None] + torch.arange(update.shape[2], device=past.device)  # [B, S]
    index = slots[:, None, :, None].expand(update.shape)
    return past.scatter(2, index, update)


@tensor_scatter.register_fake
def _(past: Tensor, update: Tensor, write_indices: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty_like(past)


@torch.library.custom_op("mistralc::attention", mutates_args=())
def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """`Attention` with grouped heads: query [B,H,S,D], key and value [B,K,C,D], mask [B,1,S,C].

    `scale` is 1 / sqrt(D) if it is None. With `softcap` c, a score s becomes c tanh(s / c) before
    it is masked (Gemma 2, arXiv:2408.00118).
    """
    if softcap is None:
        # PyTorch's CPU kernel accumulates in float32 for any input type.
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
        )
    groups = query.shape[1] // key.shape[1]
    key, value = (one.repeat_interleave(groups, 1).float() for one in (key, value))
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query.float() @ key.transpose(-1, -2) * factor  # [B, H, S, C]
    scores = torch.tanh(scores / softcap) * softcap  # [B, H, S, C]
    shares = scores.masked_fill(~mask, -torch.inf).softmax(-1)  # [B, H, S, C]
    return (shares @ value).to(query.dtype)  # [B, H, S, D]


@attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None,  # noqa: ARG001
    softcap: float | None = None,  # noqa: ARG001
) -> Tensor:  # fmt: skip
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


@torch.library.custom_op("mistralc::gather_rows", mutates_args=())
def gather_rows(x: Tensor, indices: Tensor) -> Tensor:
    """`GatherND` with one batch axis: rows `indices` [B,T] of x [B,S,E], giving [B,T,E]."""
    return x.take_along_dim(indices.unsqueeze(-1), dim=1)


@gather_rows.register_fake
def _(x: Tensor, indices: Tensor) -> Tensor:
    return x.new_empty((*indices.shape, x.shape[-1]))


@torch.library.custom_op("mistralc::split_heads", mutates_args=())
def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """`Reshape` and `Transpose`: [B, S, heads * D] to [B, heads, S, D].

    A custom operator makes the reshape a constant ("keep, keep, infer, D"). Traced from PyTorch, it
    would compute its shape from symbolic dimensions in every layer. The same goes for
    `merge_heads`.
    """
    batch, tokens, width = x.shape
    heads = x.view(batch, tokens, width // head_dim, head_dim).transpose(1, 2)
    return heads.clone(memory_format=torch.contiguous_format)  # an operator may not return a view


@split_heads.register_fake
def _(x: Tensor, head_dim: int) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[2] // head_dim, x.shape[1], head_dim))


@torch.library.custom_op("mistralc::merge_heads", mutates_args=())
def merge_heads(x: Tensor) -> Tensor:
    """`Transpose` and `Reshape`: [B, heads, S, D] to [B, S, heads * D]."""
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).flatten(2)


@merge_heads.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[2], x.shape[1] * x.shape[3]))


def _to_rms_norm(x: Any, weight: Any, epsilon: float) -> Any:
    return op.RMSNormalization(x, weight, axis=-1, epsilon=epsilon, stash_type=1)


def _to_rotary_embedding(x: Any, cos: Any, sin: Any) -> Any:
    if 2 * cos.shape[-1] == x.shape[-1]:
        return op.RotaryEmbedding(x, cos, sin)
    return op.RotaryEmbedding(x, cos, sin, rotary_embedding_dim=2 * cos.shape[-1])


def _to_tensor_scatter(past: Any, update: Any, write_indices: Any) -> Any:
    return op.TensorScatter(past, update, write_indices, axis=-2, mode="linear")


def _to_attention(
    query: Any, key: Any, value: Any, mask: Any, scale: float | None = None,
    softcap: float | None = None,
) -> Any:  # fmt: skip
    given = {"scale": scale, "softcap": softcap}
    attributes = {name: number for name, number in given.items() if number is not None}
    return op.Attention(query, key, value, mask, **attributes)[0]  # TensorRT: no softmax_precision


def _to_gather_rows(x: Any, indices: Any) -> Any:
    return op.GatherND(x, op.Unsqueeze(indices, op.Constant(value_ints=[-1])), batch_dims=1)


def _to_split_heads(x: Any, head_dim: int) -> Any:
    return op.Transpose(op.Reshape(x, op.Constant(value_ints=[0, 0, -1, head_dim])), perm=HEADS)


def _to_merge_heads(x: Any) -> Any:
    return op.Reshape(op.Transpose(x, perm=HEADS), op.Constant(value_ints=[0, 0, -1]))


def _to_mod(x: Any, divisor: Any) -> Any:
    # torch's own translation does not take a symbolic divisor. Both operands are positive here
    # (graphs/window.py ensures it), where all definitions of the remainder agree.
    return op.Mod(x, divisor)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.mistralc.rms_norm.default: _to_rms_norm,
    torch.ops.mistralc.rotary_embedding.default: _to_rotary_embedding,
    torch.ops.mistralc.tensor_scatter.default: _to_tensor_scatter,
    torch.ops.mistralc.attention.default: _to_attention,
    torch.ops.mistralc.gather_rows.default: _to_gather_rows,
    torch.ops.mistralc.split_heads.default: _to_split_heads,
    torch.ops.mistralc.merge_heads.default: _to_merge_heads,
    torch.ops.aten.remainder.Scalar: _to_mod,
}
"""The translation table for `torch.onnx.export`, from PyTorch operator to ONNX node."""
