"""Quantize a weight to codes and scales.

Every function is plain PyTorch on one weight [N, K], so the reference that finished bundles are
compared with uses the same code.
"""

import torch
from torch import Tensor

from exporter.checkpoint.quantized.value import Quantized, blocked
from graphs.dtypes import ELEMENT_TYPES, Codes, code_range
from graphs.quant_scheme import Scheme

SMALLEST = 1e-12  # smallest scale; a block of zeros would have 0


def quantize(
    weight: Tensor,
    scheme: Scheme,
    stored: torch.dtype,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
) -> Quantized:
    """Round `weight` [N, K] to the nearest code; `stored` is the type of stored scales.

    Scales and zero points may come from calibration. Otherwise each block's range is that of its
    values, so that nothing is clipped.
    """
    n, k = weight.shape
    blocks = blocked(weight.float(), scheme)  # [N, J, block]
    if scale is None:
        scale, zero_point, minimum = _range(blocks, scheme, stored)
    else:
        scale, minimum = scale.to(stored).float(), None
    shifted = blocks if minimum is None else blocks - minimum.unsqueeze(-1)
    codes = shifted / scale.unsqueeze(-1)
    if zero_point is not None:
        codes = codes + zero_point.float().unsqueeze(-1)
    return Quantized(
        scheme=scheme,
        codes=nearest_code(codes, scheme.codes).view(n, -1)[:, :k].contiguous(),
        scale=scale,
        zero_point=zero_point,
        minimum=minimum,
    )


def round_activation(x: Tensor, scheme: Scheme, scale: float) -> Tensor:
    """Round x to the scheme's activation type and back."""
    if scheme.activation is None:
        return x
    codes = nearest_code(x.float() / scale, scheme.activation)
    return (codes.float() * scale).to(x.dtype)


def nearest_code(scaled: Tensor, codes: Codes) -> Tensor:
    """Round to the nearest code, ties to even, and clamp; int4 codes are kept in int8."""
    bounded = scaled.clamp(*code_range(codes))
    dtype = getattr(torch, ELEMENT_TYPES[codes].torch or "int8")
    return (bounded if dtype.is_floating_point else bounded.round_()).to(dtype)


def _range(
    blocks: Tensor, scheme: Scheme, stored: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The tightest scale, zero point and minimum for each block [N, J, block]."""
    least, most = code_range(scheme.codes)
    if scheme.offset == "none":
        scale = (blocks.abs().amax(-1) / most).clamp_min(SMALLEST).to(stored).float()
        return scale, None, None
    low, high = blocks.amin(-1).clamp_max(0), blocks.amax(-1).clamp_min(0)
    scale = ((high - low) / (most - least)).clamp_min(SMALLEST).to(stored).float()
    if scheme.offset == "minimum":
        return scale, None, (low - least * scale).to(stored).float()
    zero_point = (least - low / scale).round().clamp(least, most).to(torch.int8)
    return scale, zero_point, None
