"""Four calibrators that choose the static scale of a rounded input from samples.

Each takes observed values [R, K] and returns the largest magnitude to represent; larger values are
clipped. `absmax` clips nothing. `percentile` clips one value in ten thousand. `entropy` minimizes
the information lost by clipping and rounding (Migacz 2017, "8-bit inference with TensorRT"). `mse`
minimizes the squared error of the output, clipping included.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from calib.methods.catalogue import CALIBRATORS
from exporter.quantization.rounding import SMALLEST, round_activation
from graphs.dtypes import ELEMENT_TYPES, code_range
from graphs.errors import UsageError
from graphs.quant_scheme import Scheme

PERCENTILE = 99.99
BINS = 2048  # of the entropy calibrator's histogram of |x|
LEVELS = 128  # of int8 for one sign
CLIPS = tuple(
    0.92**step for step in range(48)
)  # shares of the largest value, 1 to 0.02, that `mse` may try
COARSE = 4  # `mse` tries every fourth of them, then those around the best


def input_scale(
    values: Tensor, peak: float, scheme: Scheme, calibrator: str, importance: Tensor
) -> float:
    """Choose the scale of an input from sampled rows `values` [R, K].

    `peak` is the largest magnitude of all rows, of which `values` are some. `importance` [K] is the
    weight of each feature's squared error: the sum of squares of its column in the readers. Raises
    UsageError if there is no such calibrator.
    """
    if calibrator not in CALIBRATORS:
        known = ", ".join(CALIBRATORS)
        raise UsageError(f"Got the calibrator {calibrator!r}; expected one of {known}.")
    if scheme.activation is None:
        raise ValueError("the scheme does not round activations, so there is no scale to choose")
    largest = _LARGEST[calibrator](values, peak, scheme, importance)
    return max(largest / code_range(scheme.activation)[1], SMALLEST)


def rounding_error(values: Tensor, scheme: Scheme, scale: float, importance: Tensor) -> float:
    """Return the output error from rounding `values` [R, K]: importance times squared error.

    Averaged over rows and summed over features, whose rounding errors are taken as independent.
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
    """Find the threshold with the smallest Kullback-Leibler divergence of the histogram of |x|.

    For each number of kept bins, the reference has the rest added to the last kept bin; the
    candidate has the kept bins averaged within `LEVELS` equal parts, empty bins left empty. FP8 has
    no equal steps, so its range is not clipped.
    """
    if not ELEMENT_TYPES[scheme.activation or "int8"].is_integer or peak <= 0:
        return peak
    counts = torch.histc(values.abs(), BINS, 0, peak).double()  # [BINS]
    best, chosen = float("inf"), BINS
    for kept in range(LEVELS, BINS + 1, LEVELS // 8):
        reference = counts[:kept].clone()
        reference[-1] += counts[kept:].sum()
        part = torch.arange(kept) * LEVELS // kept  # [kept], the level of each bin
        filled = (counts[:kept] > 0).double()
        total = torch.zeros(LEVELS, dtype=torch.float64).index_add_(0, part, counts[:kept])
        width = torch.zeros(LEVELS, dtype=torch.float64).index_add_(0, part, filled)
        candidate = (total / width.clamp_min(1))[part] * filled
        divergence = _divergence(reference, candidate)
        if divergence < best:
            best, chosen = divergence, kept
    return peak * chosen / BINS


def _divergence(reference: Tensor, candidate: Tensor) -> float:
    """Return the KL divergence in nats; empty candidate bins count as a probability of 1e-9."""
    p = reference / reference.sum()
    q = (candidate / candidate.sum().clamp_min(1)).clamp_min(1e-9)
    seen = p > 0
    return float((p[seen] * (p[seen] / q[seen]).log()).sum())


_LARGEST: Mapping[str, Callable[[Tensor, float, Scheme, Tensor], float]] = {
    "absmax": _absmax, "percentile": _percentile, "entropy": _entropy, "mse": _mse,
}  # fmt: skip
