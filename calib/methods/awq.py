"""AWQ: smoothing for weights that are rounded and inputs that are not. Knows no model.

After Lin et al. 2023 (arXiv:2306.00978): the features that see the largest inputs are rounded
finest. Where the paper runs the samples again for each candidate, the second moment of the inputs
gives the same error exactly.
"""

from collections.abc import Callable, Iterator

from torch import Tensor

from calib.methods.clipping import fit, judge, output_error, rescaled
from calib.methods.observation import Observation
from calib.methods.smoothing import best, judged, scales
from graphs.quant_scheme import Scheme

STEPS = 10  # of the exponent, from 0 to 1
COARSE = (0.85, 0.7)  # ratios of a block's range while smoothing is searched


def smoothing(
    weight: Tensor, observation: Observation, scheme: Scheme, tie: Callable[[Tensor], Tensor]
) -> Tensor:
    """Choose s [K] for the readers `weight` [N, K], stacked; `tie` equates what must be equal."""
    activation = tie(observation.magnitude)
    columns = tie(weight.abs().mean(0))
    some = judged(weight)

    def candidates() -> Iterator[Tensor]:
        for step in range(STEPS + 1):
            a = step / STEPS
            yield scales(activation, columns, a, 0)
            if step:
                yield scales(activation, columns, a, 1 - a)

    own = judge(observation.second_moment, scheme)

    def error(s: Tensor) -> float:
        rounded = fit(some * s, rescaled(own, s, scheme), scheme, COARSE).dequantized() / s
        return output_error(rounded - some, observation.second_moment)

    return best(candidates(), error)
