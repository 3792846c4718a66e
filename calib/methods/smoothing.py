"""Scales on input features that the layer before takes back. Knows no error measure.

Dividing feature k by s[k] and multiplying column k of every reader by it changes nothing in real
numbers, and a lot in rounded ones. This is the part that SmoothQuant (arXiv:2211.10438, eq. 4)
and AWQ (arXiv:2306.00978, eq. 5) share: s = activation^a / weight^b, with a and b searched.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from graphs.quant_scheme import Group
from graphs.spec import ModelSpec

SMALLEST = 1e-4  # of the largest magnitude: features that samples hardly touch are not blown up
WIDEST = 2.0**12  # most that a scale may be from their mean: the producer stays within float16
JUDGED = 1024  # rows of a weight that a search looks at; errors of rows are independent


def tied(values: Tensor, group: Group, spec: ModelSpec) -> Tensor:
    """Make values [K] equal wherever one row of the group's producer feeds several features.

    That is the input of `o_proj` with grouped queries: the query heads [H / K each] that read one
    value head share its scales. The largest value is taken.
    """
    if not group.producer.endswith("v_proj.weight"):
        return values
    heads = values.view(spec.num_key_value_heads, -1, spec.head_dim)
    return heads.amax(1, keepdim=True).expand_as(heads).reshape(-1)


def scales(activation: Tensor, weight: Tensor, a: float, b: float) -> Tensor:
    """Return s = activation^a / weight^b, [K] each, with a geometric mean of 1."""
    logarithm = a * _logarithm(activation) - b * _logarithm(weight)
    centred = logarithm - logarithm.mean()
    return centred.clamp(-_bound(), _bound()).exp()


def judged(weight: Tensor) -> Tensor:
    """At most `JUDGED` of the rows of a weight [N, K], evenly spread."""
    return weight[:: -(-len(weight) // JUDGED)]


def best(candidates: Iterator[Tensor], error: Callable[[Tensor], float]) -> Tensor:
    """Return the smoothing [K] with the least error; the first of equals."""
    return min(((error(s), number, s) for number, s in enumerate(candidates)))[2]


def _logarithm(values: Tensor) -> Tensor:
    return values.clamp_min(float(values.max()) * SMALLEST).clamp_min(1e-30).log()


def _bound() -> float:
    return float(torch.tensor(WIDEST).log())
