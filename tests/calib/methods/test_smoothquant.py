"""SmoothQuant's search for the migration strength."""

import pytest
import torch
from torch import Tensor

from calib.methods import smoothquant
from calib.methods.catalogue import CALIBRATORS
from calib.methods.clipping import SCALE_DTYPE
from calib.methods.input_ranges import input_scale
from exporter.quantization.rounding import quantize, round_activation
from graphs.quant_scheme import Scheme
from tests.support.calibration_samples import observed, with_outliers

INT8 = Scheme(codes="int8", activation="int8")
FP8 = Scheme(codes="float8e4m3", activation="float8e4m3")


def weight() -> Tensor:
    return torch.randn(64, 96, generator=torch.Generator().manual_seed(1))


def true_error(s: Tensor, scheme: Scheme, calibrator: str) -> float:
    """Return the mean squared output error on all samples, with both operands rounded."""
    x, w = with_outliers(), weight()
    rounded = quantize(w * s, scheme, SCALE_DTYPE).dequantized()
    values = x / s
    scale = input_scale(
        values, float(values.abs().max()), scheme, calibrator, rounded.square().sum(0)
    )
    return float((round_activation(values, scheme, scale) @ rounded.T - x @ w.T).square().mean())


@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_it_beats_no_smoothing_for_inputs_with_outliers(calibrator: str) -> None:
    s = smoothquant.choose_smoothing(
        weight(), observed(with_outliers()), INT8, calibrator, lambda values: values
    )
    # without smoothing, three of 96 features set the scale of all of them
    assert true_error(s, INT8, calibrator) < 0.3 * true_error(torch.ones(96), INT8, calibrator)


def test_the_searched_strength_is_no_worse_than_the_papers_default_of_one_half() -> None:
    x, w = with_outliers(), weight()
    s = smoothquant.choose_smoothing(w, observed(x), INT8, "mse", lambda values: values)
    half = (x.abs().amax(0) / w.abs().amax(0)).sqrt()
    # the search assumes independent rounding errors, which is accurate to a few percent
    assert true_error(s, INT8, "mse") < 1.05 * true_error(half, INT8, "mse")


def test_smoothing_does_no_harm_to_fp8_which_has_exponents() -> None:
    s = smoothquant.choose_smoothing(
        weight(), observed(with_outliers()), FP8, "mse", lambda values: values
    )
    # 5% as in the test above
    assert true_error(s, FP8, "mse") < 1.05 * true_error(torch.ones(96), FP8, "mse")


def test_the_estimated_error_is_close_to_the_error_on_all_samples() -> None:
    x, w = with_outliers(), weight()
    for s in (torch.ones(96), (x.abs().amax(0) / w.abs().amax(0)).sqrt()):
        quick = smoothquant.smoothing_error(s, w, observed(x), INT8, "mse") / len(w)
        # rounding errors are not quite independent: the estimate is within 25%
        assert quick == pytest.approx(true_error(s, INT8, "mse"), rel=0.25)
