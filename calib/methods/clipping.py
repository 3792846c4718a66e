"""Scales that clip: the range of a block that costs the output least. Knows no model.

A block's largest weight need not be representable: a smaller range rounds all others finer. What
a rounding costs is measured with the inputs' second moment H = X^T X / T: an error D [N, K] of
the weight changes the output by tr(D H D^T) a token (the layer-wise objective of GPTQ,
arXiv:2210.17323, and of AWQ's clipping, arXiv:2306.00978, without running a sample again).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from exporter.quantization.rounding import Quantized, blocked, quantize
from graphs.quant_scheme import Scheme

STORED = torch.float16  # what scales are rounded to, so that one table serves every target
RATIOS = tuple(round(1.05 - 0.05 * step, 2) for step in range(14))  # of the range: 1.05 to 0.4
TINY = torch.finfo(STORED).tiny
WIDEST = 128  # input features of a block whose correlations are looked at


def fit(
    weight: Tensor, judge: Tensor, scheme: Scheme, ratios: Sequence[float] = RATIOS
) -> Quantized:
    """Round `weight` [N, K] with the ratio of each block's range that is best for its output.

    Blocks are judged one at a time, each by its own part of H, which is what `judge` makes.
    """
    best = quantize(weight, scheme, STORED)
    least = _cost(best, weight, judge)  # [N, J]
    scale, zero_point = best.scale.clone(), best.zero_point
    for ratio in ratios:
        smaller = (best.scale * ratio).clamp_min(TINY)
        tried = quantize(weight, scheme, STORED, smaller, zero_point)
        cost = _cost(tried, weight, judge)
        better = cost < least
        least = torch.where(better, cost, least)
        scale = torch.where(better, tried.scale, scale)
    return quantize(weight, scheme, STORED, scale, zero_point)


def settle(weight: Tensor, found: Quantized, second_moment: Tensor, sweeps: int = 2) -> Quantized:
    """Choose the ratios of `found` again, one block after another, each knowing all the others.

    What blocks do wrong adds up in the output, so a block may make up for the rest. Coordinate
    descent on tr(D H D^T): no choice makes it larger, but for the last bits of the sum. Codes stay
    the nearest ones.
    """
    scheme, size = found.scheme, found.scheme.block
    if size is None or found.scale.shape[1] == 1:
        return found
    widest = quantize(weight, scheme, STORED).scale  # [N, J]
    difference, scale = found.dequantized() - weight, found.scale.clone()
    for _ in range(sweeps):
        for number, start in enumerate(range(0, weight.shape[1], size)):
            columns = slice(start, min(start + size, weight.shape[1]))
            own = second_moment[columns, columns]
            # what the other blocks do wrong, seen through the inputs of this one
            rest = difference @ second_moment[:, columns] - difference[:, columns] @ own
            part, at = weight[:, columns], slice(number, number + 1)
            zero_point = None if found.zero_point is None else found.zero_point[:, at]
            least = torch.full_like(scale[:, at], torch.inf)
            for candidate in (scale[:, at].clone(), *(widest[:, at] * ratio for ratio in RATIOS)):
                tried = quantize(part, scheme, STORED, candidate.clamp_min(TINY), zero_point)
                error = tried.dequantized() - part
                cost = ((error @ own + 2 * rest) * error).sum(1, keepdim=True)
                better = cost < least
                least = torch.where(better, cost, least)
                scale[:, at] = torch.where(better, tried.scale, scale[:, at])
                difference[:, columns] = torch.where(better, error, difference[:, columns])
    return quantize(weight, scheme, STORED, scale, found.zero_point)


def judge(second_moment: Tensor, scheme: Scheme) -> Tensor:
    """Cut H [K, K] to what blocks are judged by: [J, block, block], or H's diagonal [J, block].

    The diagonal serves blocks of more than `WIDEST`: K x K products for every ratio would take
    longer than the rest of calibration.
    """
    features = len(second_moment)
    size = scheme.block or features
    blocks = scheme.blocks(features)
    if size > WIDEST:
        return second_moment.diagonal().view(blocks, size).clone()
    padding = blocks * size - features
    square = F.pad(second_moment, (0, padding, 0, padding)).view(blocks, size, blocks, size)
    return square.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def rescaled(judge: Tensor, smoothing: Tensor, scheme: Scheme) -> Tensor:
    """What `judge` makes of the second moment of X / smoothing, [K]."""
    inverse = blocked(smoothing.reciprocal()[None], scheme)[0]  # [J, block]
    if judge.dim() == 2:
        return judge * inverse.square()
    return judge * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)


def output_error(difference: Tensor, second_moment: Tensor) -> float:
    """Return tr(D H D^T): the mean squared error of the output, summed over its N features."""
    return float(((difference @ second_moment) * difference).sum(dtype=torch.float64))


def _cost(tried: Quantized, weight: Tensor, judge: Tensor) -> Tensor:
    """What each block's rounding costs, [N, J]."""
    difference = blocked(tried.dequantized() - weight, tried.scheme)  # [N, J, block]
    if judge.dim() == 2:
        return (difference.square() * judge).sum(-1)
    by_block = difference.transpose(0, 1)  # [J, N, block]
    return (torch.bmm(by_block, judge) * by_block).sum(-1).T
