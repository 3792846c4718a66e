"""One static scale for an activation, from samples of it: four calibrators. Knows no model.

Each takes values that were seen, [R, K], and gives the largest magnitude that is to be
representable; what is larger is clipped. `absmax` clips nothing. `percentile` clips one value in
ten thousand. `entropy` looks for the clipped and rounded distribution that loses least
information (Migacz 2017, "8-bit inference with TensorRT"). `mse` looks for the least squared error,
clipping included, of the output.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from exporter.quantization.rounding import SMALLEST, round_activation
from graphs.dtypes import ELEMENT_TYPES, code_range
from graphs.errors import UsageError
from graphs.quant_scheme import Scheme

PERCENTILE = 99.99
BINS, LEVELS = 2048, 128  # of the entropy calibrator: what is seen, and what int8 has on one side
CLIPS = tuple(0.92**step for step in range(48))  # shares of the largest value: 1 to 0.02
COARSE = 4  # every fourth of them is tried first, then those around the best


def input_scale(
    values: Tensor, peak: float, scheme: Scheme, calibrator: str, importance: Tensor
) -> float:
    """Choose the scale of an input whose samples are `values` [R, K] and largest magnitude `peak`.

    `peak` is over everything that was seen, of which `values` are a part. `importance` [K] is what
    a squared error of each feature costs: the sum of squares of its column in the readers.
    """
    if calibrator not in CALIBRATORS:
        known = ", ".join(CALIBRATORS)
        raise UsageError(f"The calibrator {calibrator!r} is not known; one of {known} is expected.")
    if scheme.activation is None:
        raise ValueError("a scheme without rounded activations has no scale for them")
    largest = CALIBRATORS[calibrator](values, peak, scheme, importance)
    return max(largest / code_range(scheme.activation)[1], SMALLEST)


def rounding_error(values: Tensor, scheme: Scheme, scale: float, importance: Tensor) -> float:
    """What rounding `values` [R, K] costs: the mean over rows of importance times error squared.

    Rounding errors of different features are taken to be independent of each other.
    """
    difference = round_activation(values, scheme, scale).sub_(values)
    return float(difference.square_().mean(0) @ importance)


def _absmax(values: Tensor, peak: float, scheme: Scheme, importance: Tensor) -> float:  # noqa: ARG001
    return peak


def _percentile(values: Tensor, peak: float, scheme: Scheme, importance: Tensor) -> float:  # noqa: ARG001
    size = values.abs().flatten()
    rank = max(1, round(len(size) * PERCENTILE / 100))
    return float(size.kthvalue(rank).values)


def _mse(values: Tensor, peak: float, scheme: Scheme, importance: Tensor) -> float:
    most = code_range(scheme.activation or "int8")[1]
    costs: dict[int, float] = {}

    def cost(step: int) -> float:
        if step not in costs:
            scale = max(peak * CLIPS[step] / most, SMALLEST)
            costs[step] = rounding_error(values, scheme, scale, importance)
        return costs[step]

    best = min(range(0, len(CLIPS), COARSE), key=cost)
    around = range(max(0, best - COARSE + 1), min(len(CLIPS), best + COARSE))
    return peak * CLIPS[min(around, key=cost)]


def _entropy(values: Tensor, peak: float, scheme: Scheme, importance: Tensor) -> float:  # noqa: ARG001
    """The threshold with the least Kullback-Leibler divergence of the histogram of |x|.

    For each number of bins that is kept, the rest is added to the last one (the reference), and
    the kept bins are averaged within `LEVELS` equal parts, those that are empty left empty (the
    candidate). FP8 has no equal steps: its range is taken as it is.
    """
    if not ELEMENT_TYPES[scheme.activation or "int8"].is_integer or peak <= 0:
        return peak
    counts = torch.histc(values.abs(), BINS, 0, peak).double()  # [BINS]
    best, chosen = float("inf"), BINS
    for kept in range(LEVELS, BINS + 1, LEVELS // 8):
        reference = counts[:kept].clone()
        reference[-1] += counts[kept:].sum()
        part = torch.arange(kept) * LEVELS // kept  # which level each bin falls in
        filled = (counts[:kept] > 0).double()
        total = torch.zeros(LEVELS, dtype=torch.float64).index_add_(0, part, counts[:kept])
        width = torch.zeros(LEVELS, dtype=torch.float64).index_add_(0, part, filled)
        candidate = (total / width.clamp_min(1))[part] * filled
        divergence = _divergence(reference, candidate)
        if divergence < best:
            best, chosen = divergence, kept
    return peak * chosen / BINS


def _divergence(reference: Tensor, candidate: Tensor) -> float:
    """KL divergence in nats of two histograms; an empty candidate bin counts as a rare one."""
    p = reference / reference.sum()
    q = (candidate / candidate.sum().clamp_min(1)).clamp_min(1e-9)
    seen = p > 0
    return float((p[seen] * (p[seen] / q[seen]).log()).sum())


CALIBRATORS: Mapping[str, Callable[[Tensor, float, Scheme, Tensor], float]] = {
    "absmax": _absmax, "percentile": _percentile, "entropy": _entropy, "mse": _mse,
}  # fmt: skip
