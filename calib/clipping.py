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

from exporter.quantize import Quantized, blocked, quantize
from graphs.scheme import Scheme

STORED = torch.float16  # what scales are rounded to, so that one table serves every target
RATIOS = tuple(round(1.05 - 0.05 * step, 2) for step in range(14))  # of the range: 1.05 to 0.4
WIDEST = 128  # input features of a block whose correlations are looked at


def fit(weight: Tensor, second_moment: Tensor, scheme: Scheme, ratios: Sequence[float] = RATIOS,
        ) -> Quantized:  # fmt: skip
    """Round `weight` [N, K] with the ratio of each block's range that is best for its output.

    Blocks are judged one at a time, each by its own part of H [K, K]; a whole row by H's diagonal,
    because K x K products for every ratio would take longer than the rest of calibration.
    """
    best = quantize(weight, scheme, STORED)
    least = _cost(best, weight, second_moment)  # [N, J]
    scale, zero_point = best.scale.clone(), best.zero_point
    for ratio in ratios:
        tried = quantize(weight, scheme, STORED, _scaled(best.scale, ratio), zero_point)
        cost = _cost(tried, weight, second_moment)
        better = cost < least
        least = torch.where(better, cost, least)
        scale = torch.where(better, tried.scale, scale)
    return quantize(weight, scheme, STORED, scale, zero_point)


def output_error(difference: Tensor, second_moment: Tensor) -> float:
    """Return tr(D H D^T): the mean squared error of the output, summed over its N features."""
    return float(((difference @ second_moment) * difference).sum(dtype=torch.float64))


def _scaled(scale: Tensor, ratio: float) -> Tensor:
    return (scale * ratio).clamp_min(torch.finfo(STORED).tiny)


def _cost(tried: Quantized, weight: Tensor, second_moment: Tensor) -> Tensor:
    """What each block's rounding costs, [N, J]."""
    difference = blocked(tried.dequantized() - weight, tried.scheme)  # [N, J, block]
    blocks, size = difference.shape[1:]
    if size > WIDEST:
        return (difference.square() * second_moment.diagonal()).sum(-1)
    padding = blocks * size - len(second_moment)
    square = F.pad(second_moment, (0, padding, 0, padding)).view(blocks, size, blocks, size)
    own = square.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [J, block, block]
    by_block = difference.transpose(0, 1)  # [J, N, block]
    return (torch.bmm(by_block, own) * by_block).sum(-1).T
