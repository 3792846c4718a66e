"""Methods and calibrators by name. Imports nothing heavy, so that `--help` can list them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from graphs.precisions import precision_named

CALIBRATORS = ("mse", "percentile", "entropy", "absmax")
"""Names of the calibrators for rounded inputs (`input_ranges.py`), the default first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How to decide a group's numbers.

    `drift` is the share, 0 to 1, of the error of earlier groups that GPTQ corrects. It helps GPTQ
    without smoothing; with smoothed and rounded inputs it raised SmolLM2's perplexity by a third.
    """

    smoothing: Literal["none", "awq", "smoothquant"] = "none"
    gptq: bool = False
    drift: float = 0.0


FOR_WEIGHTS_ONLY: Mapping[str, Method] = {
    "gptq": Method(gptq=True, drift=1.0),
    "awq+gptq": Method(smoothing="awq", gptq=True),
    "awq": Method(smoothing="awq"),
}
FOR_ROUNDED_INPUTS: Mapping[str, Method] = {
    "smoothquant+gptq": Method(smoothing="smoothquant", gptq=True),
    "smoothquant": Method(smoothing="smoothquant"),
    "nearest": Method(),
}


def methods_for(precision: str) -> Mapping[str, Method]:
    """Return the methods that can calibrate a quantized precision, by name, the default first."""
    rounds_inputs = precision_named(precision).needs_calibration
    return FOR_ROUNDED_INPUTS if rounds_inputs else FOR_WEIGHTS_ONLY
