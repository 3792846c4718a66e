"""SmoothQuant: smoothing for weights and inputs that are both rounded. Knows no model.

After Xiao et al. 2022 (arXiv:2211.10438): inputs hand some of their outliers to the weights. How
much, the migration strength, is searched for each group by the error of its output on sampled
rows, rounded as they will be.
"""

from collections.abc import Callable, Iterator

from torch import Tensor

from calib.methods.clipping import STORED, output_error
from calib.methods.input_ranges import input_scale, rounding_error
from calib.methods.observation import Observation
from calib.methods.smoothing import best, judged, scales
from exporter.quantization.rounding import quantize
from graphs.quant_scheme import Scheme

STEPS = 20  # of the migration strength, from 0 to 1
ROWS = 512  # of the samples that are rounded for each candidate


def smoothing(
    weight: Tensor, observation: Observation, scheme: Scheme, calibrator: str,
    tie: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """Choose s [K] for the readers `weight` [N, K], stacked; `tie` equates what must be equal."""
    activation = tie(observation.peak)
    columns = tie(weight.abs().amax(0))

    def candidates() -> Iterator[Tensor]:
        for step in range(STEPS + 1):
            yield scales(activation, columns, step / STEPS, 1 - step / STEPS)

    return best(candidates(), lambda s: error(s, judged(weight), observation, scheme, calibrator))


def error(
    smoothing: Tensor, weight: Tensor, observation: Observation, scheme: Scheme, calibrator: str
) -> float:
    """Squared error of the output of `weight` [N, K], from both roundings, summed over N.

    What the weight's rounding does follows from the inputs' second moment, what the input's does
    from rounding sampled rows: no product with the samples is needed.
    """
    scaled = weight * smoothing
    rounded = quantize(scaled, scheme, STORED).dequantized()
    importance = rounded.square().sum(0)
    values = observation.rows[:: -(-len(observation.rows) // ROWS)] / smoothing
    peak = float((observation.peak / smoothing).max())
    scale = input_scale(values, peak, scheme, calibrator, importance)
    of_weight = output_error(rounded / smoothing - weight, observation.second_moment)
    return of_weight + rounding_error(values, scheme, scale, importance)
