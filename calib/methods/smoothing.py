"""Scales that move magnitude between an input feature and the weights that read it.

Dividing feature k by s[k] and multiplying column k of every reader by it changes nothing in exact
arithmetic, but it changes rounding errors. SmoothQuant (arXiv:2211.10438, eq. 4) and AWQ
(arXiv:2306.00978, eq. 5) share the form s = activation^a / weight^b, with a and b searched.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from graphs.quant_scheme import Group
from graphs.spec import ModelSpec

FLOOR = 1e-4  # of the largest magnitude: limits the scale of features that are nearly always zero
MAX_SCALE = 2.0**12  # relative to the geometric mean: the producer stays within float16
SEARCH_ROWS = 1024  # of a weight, for the search: the errors of rows are independent


def tied(values: Tensor, group: Group, spec: ModelSpec) -> Tensor:
    """Give features [K] that come from the same row of the producer the same value, their maximum.

    This concerns the input of `o_proj` with grouped queries: the query heads that read one value
    head must share its scales.
    """
    if not group.producer.endswith("v_proj.weight"):
        return values
    heads = values.view(spec.num_key_value_heads, -1, spec.head_dim)
    return heads.amax(1, keepdim=True).expand_as(heads).reshape(-1)


def smoothing_scales(activation: Tensor, weight: Tensor, a: float, b: float) -> Tensor:
    """Return s = activation^a / weight^b [K], scaled to a geometric mean of 1 and bounded."""
    logarithm = a * _logarithm(activation) - b * _logarithm(weight)
    centred = logarithm - logarithm.mean()
    return centred.clamp(-_bound(), _bound()).exp()


def sampled_rows(weight: Tensor) -> Tensor:
    """Return at most `SEARCH_ROWS` evenly spaced rows of a weight [N, K]."""
    return weight[:: -(-len(weight) // SEARCH_ROWS)]


def best_smoothing(candidates: Iterator[Tensor], error: Callable[[Tensor], float]) -> Tensor:
    """Return the candidate [K] with the smallest error, the first if several are equal."""
    return min(((error(s), number, s) for number, s in enumerate(candidates)))[2]


def _logarithm(values: Tensor) -> Tensor:
    return values.clamp_min(float(values.max()) * FLOOR).clamp_min(1e-30).log()


def _bound() -> float:
    return float(torch.tensor(MAX_SCALE).log())
