"""SmoothQuant: smoothing for layers that round both weights and inputs.

After Xiao et al. 2022 (arXiv:2211.10438): outliers of the inputs are moved into the weights. The
migration strength is searched for each group, by its output error on sampled, rounded rows.
"""

from collections.abc import Callable, Iterator

from torch import Tensor

from calib.methods.clipping import SCALE_DTYPE, output_error
from calib.methods.input_ranges import input_scale, rounding_error
from calib.methods.observation import Observation
from calib.methods.smoothing import best_smoothing, sampled_rows, smoothing_scales
from exporter.quantization.rounding import quantize
from graphs.quant_scheme import Scheme

STEPS = 20  # of the migration strength, from 0 to 1
ROWS = 512  # sampled inputs that are rounded for each candidate


def choose_smoothing(
    weight: Tensor, observation: Observation, scheme: Scheme, calibrator: str,
    tie: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """Choose the smoothing s [K] for the stacked readers `weight` [N, K].

    `tie` gives one value to all features that must share a scale (`smoothing.tied`).
    """
    activation = tie(observation.peak)  # [K]
    columns = tie(weight.abs().amax(0))  # [K]

    def candidates() -> Iterator[Tensor]:
        for step in range(STEPS + 1):
            yield smoothing_scales(activation, columns, step / STEPS, 1 - step / STEPS)

    return best_smoothing(
        candidates(),
        lambda s: smoothing_error(s, sampled_rows(weight), observation, scheme, calibrator),
    )


def smoothing_error(
    smoothing: Tensor, weight: Tensor, observation: Observation, scheme: Scheme, calibrator: str
) -> float:
    """Return the squared output error of `weight` [N, K] from both roundings, summed over N.

    The weight's part follows from the inputs' second moment, the input's part from rounding sampled
    rows, so neither needs a product of samples and weights.
    """
    scaled = weight * smoothing
    rounded = quantize(scaled, scheme, SCALE_DTYPE).dequantized()
    importance = rounded.square().sum(0)
    values = observation.rows[:: -(-len(observation.rows) // ROWS)] / smoothing
    peak = float((observation.peak / smoothing).max())
    scale = input_scale(values, peak, scheme, calibrator, importance)
    of_weight = output_error(rounded / smoothing - weight, observation.second_moment)
    return of_weight + rounding_error(values, scheme, scale, importance)
