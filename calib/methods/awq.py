"""AWQ: smoothing for layers that round weights and not inputs.

After Lin et al. 2023 (arXiv:2306.00978): the features with the largest inputs are rounded finest.
The paper runs the samples again for each candidate; we compute the same error exactly from the
second moment of the inputs.
"""

from collections.abc import Callable, Iterator

from torch import Tensor

from calib.methods.clipping import block_moments, fit_scales, output_error, rescaled_moments
from calib.methods.observation import Observation
from calib.methods.smoothing import best_smoothing, sampled_rows, smoothing_scales
from graphs.quant_scheme import Scheme

STEPS = 10  # of the exponent, from 0 to 1
COARSE_RATIOS = (0.85, 0.7)  # of a block's range, tried for every candidate smoothing


def choose_smoothing(
    weight: Tensor, observation: Observation, scheme: Scheme, tie: Callable[[Tensor], Tensor]
) -> Tensor:
    """Choose the smoothing s [K] for the stacked readers `weight` [N, K].

    `tie` gives one value to all features that must share a scale (`smoothing.tied`).
    """
    activation = tie(observation.magnitude)  # [K]
    columns = tie(weight.abs().mean(0))  # [K]
    rows = sampled_rows(weight)

    def candidates() -> Iterator[Tensor]:
        for step in range(STEPS + 1):
            a = step / STEPS
            yield smoothing_scales(activation, columns, a, 0)
            if step:
                yield smoothing_scales(activation, columns, a, 1 - a)

    moments = block_moments(observation.second_moment, scheme)

    def error(s: Tensor) -> float:
        smoothed_moments = rescaled_moments(moments, s, scheme)
        rounded = fit_scales(rows * s, smoothed_moments, scheme, COARSE_RATIOS).dequantized() / s
        return output_error(rounded - rows, observation.second_moment)

    return best_smoothing(candidates(), error)
