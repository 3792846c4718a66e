"""Scales that clip: for each block, the range that gives the smallest output error.

The scale of a block may be too small for its largest weight: a smaller range rounds all others
more finely. The cost of a rounding follows from the inputs' second moment H = X^T X / T: a weight
error D [N, K] changes the output by tr(D H D^T) per token. This is the layer-wise objective of GPTQ
(arXiv:2210.17323) and of AWQ's clipping (arXiv:2306.00978), computed without running samples again.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from exporter.checkpoint.quantized.value import Quantized, blocked
from exporter.quantization.rounding import quantize
from graphs.quant_scheme import Scheme

SCALE_DTYPE = torch.float16  # scales are rounded to it, so that one table serves every target
CLIP_RATIOS = tuple(round(1.05 - 0.05 * step, 2) for step in range(14))  # of the range: 1.05 to 0.4
TINY = torch.finfo(SCALE_DTYPE).tiny
MAX_CORRELATED_BLOCK = 128  # input features; larger blocks are judged by H's diagonal


def fit_scales(
    weight: Tensor, moments: Tensor, scheme: Scheme, ratios: Sequence[float] = CLIP_RATIOS
) -> Quantized:
    """Round `weight` [N, K] with the range of each block that gives the smallest output error.

    Each block is judged alone, by its own part of H: `moments` is what `block_moments` returns.
    """
    best = quantize(weight, scheme, SCALE_DTYPE)
    least = _cost(best, weight, moments)  # [N, J]
    scale, zero_point = best.scale.clone(), best.zero_point
    for ratio in ratios:
        smaller = (best.scale * ratio).clamp_min(TINY)
        tried = quantize(weight, scheme, SCALE_DTYPE, smaller, zero_point)
        cost = _cost(tried, weight, moments)
        better = cost < least
        least = torch.where(better, cost, least)
        scale = torch.where(better, tried.scale, scale)
    return quantize(weight, scheme, SCALE_DTYPE, scale, zero_point)


def refine_scales(
    weight: Tensor, found: Quantized, second_moment: Tensor, sweeps: int = 2
) -> Quantized:
    """Choose the range of each block of `found` again, given the errors of all other blocks.

    Block errors add up in the output, so one block can compensate for others. This is coordinate
    descent on tr(D H D^T): up to rounding of the sum, no step increases it. Codes stay the nearest
    ones.
    """
    scheme, size = found.scheme, found.scheme.block
    if size is None or found.scale.shape[1] == 1:
        return found
    widest = quantize(weight, scheme, SCALE_DTYPE).scale  # [N, J]
    difference, scale = found.dequantized() - weight, found.scale.clone()
    for _ in range(sweeps):
        for number, start in enumerate(range(0, weight.shape[1], size)):
            columns = slice(start, min(start + size, weight.shape[1]))
            own = second_moment[columns, columns]
            # the other blocks' error, as correlated with the inputs of this block
            rest = difference @ second_moment[:, columns] - difference[:, columns] @ own
            part, at = weight[:, columns], slice(number, number + 1)
            zero_point = None if found.zero_point is None else found.zero_point[:, at]
            least = torch.full_like(scale[:, at], torch.inf)
            clipped = [widest[:, at] * ratio for ratio in CLIP_RATIOS]
            for candidate in (scale[:, at].clone(), *clipped):
                tried = quantize(part, scheme, SCALE_DTYPE, candidate.clamp_min(TINY), zero_point)
                error = tried.dequantized() - part
                cost = ((error @ own + 2 * rest) * error).sum(1, keepdim=True)
                better = cost < least
                least = torch.where(better, cost, least)
                scale[:, at] = torch.where(better, tried.scale, scale[:, at])
                difference[:, columns] = torch.where(better, error, difference[:, columns])
    return quantize(weight, scheme, SCALE_DTYPE, scale, found.zero_point)


def block_moments(second_moment: Tensor, scheme: Scheme) -> Tensor:
    """Return the diagonal blocks of H [K, K]: [J, block, block], or just its diagonal [J, block].

    The diagonal is used for blocks of more than `MAX_CORRELATED_BLOCK` features: K x K products for
    every ratio would take longer than the rest of calibration.
    """
    features = len(second_moment)
    size = scheme.block or features
    blocks = scheme.blocks(features)
    if size > MAX_CORRELATED_BLOCK:
        return second_moment.diagonal().view(blocks, size).clone()
    padding = blocks * size - features
    square = F.pad(second_moment, (0, padding, 0, padding)).view(blocks, size, blocks, size)
    return square.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def rescaled_moments(moments: Tensor, smoothing: Tensor, scheme: Scheme) -> Tensor:
    """Return the `block_moments` of X / smoothing, given those of X; `smoothing` is [K]."""
    inverse = blocked(smoothing.reciprocal()[None], scheme)[0]  # [J, block]
    if moments.dim() == 2:
        return moments * inverse.square()
    return moments * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)


def output_error(difference: Tensor, second_moment: Tensor) -> float:
    """Return tr(D H D^T): the mean squared error of the output, summed over its N features.

    `difference` is the weight's error D [N, K], `second_moment` the inputs' H [K, K].
    """
    return float(((difference @ second_moment) * difference).sum(dtype=torch.float64))


def _cost(tried: Quantized, weight: Tensor, moments: Tensor) -> Tensor:
    """Return the output error of each block alone, [N, J]."""
    difference = blocked(tried.dequantized() - weight, tried.scheme)  # [N, J, block]
    if moments.dim() == 2:
        return (difference.square() * moments).sum(-1)
    by_block = difference.transpose(0, 1)  # [J, N, block]
    return (torch.bmm(by_block, moments) * by_block).sum(-1).T
