"""Calibrators of static ranges on synthetic activations with a known answer."""

import pytest
import torch

from calib.methods.catalogue import CALIBRATORS
from calib.methods.input_ranges import input_scale, rounding_error
from graphs.errors import UsageError
from graphs.quant_scheme import Scheme

INT8 = Scheme(codes="int8", activation="int8")
FP8 = Scheme(codes="float8e4m3", activation="float8e4m3")
EVEN = torch.ones(64)


def normal(rows: int = 512) -> torch.Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(0))


def clipped_at(values: torch.Tensor, calibrator: str, importance: torch.Tensor = EVEN) -> float:
    return input_scale(values, float(values.abs().max()), INT8, calibrator, importance) * 127


def test_absmax_clips_nothing() -> None:
    values = normal()
    assert clipped_at(values, "absmax") == pytest.approx(float(values.abs().max()))


def test_percentile_clips_one_value_in_ten_thousand() -> None:
    values = torch.arange(1.0, 64_001.0).view(1000, 64)
    # 6 of the 64,000 values lie above the percentile
    assert clipped_at(values, "percentile") == pytest.approx(63_994)


@pytest.mark.parametrize("calibrator", ["percentile", "entropy"])
def test_a_lone_outlier_is_clipped(calibrator: str) -> None:
    values = normal()
    values[0, 0] = 60.0
    assert clipped_at(values, calibrator) < 12


@pytest.mark.parametrize("calibrator", ["percentile", "entropy", "mse"])
def test_uniform_values_are_not_clipped(calibrator: str) -> None:
    values = torch.linspace(-3, 3, 512 * 64).view(512, 64)
    # a step of the search is 8% of the range
    assert clipped_at(values, calibrator) > 0.9 * 3


def test_mse_has_the_smallest_error_on_heavy_tails() -> None:
    values = normal() ** 3
    cost = {
        name: rounding_error(values, INT8, clipped_at(values, name) / 127, EVEN)
        for name in CALIBRATORS
    }
    assert cost["mse"] == min(cost.values())


def test_an_outlier_that_no_linear_reads_does_not_widen_the_range() -> None:
    values = normal()
    values[:, 0] *= 50
    unread = EVEN.clone()
    unread[0] = 0
    assert clipped_at(values, "mse", unread) < 10 < clipped_at(values, "mse")


def test_fp8_uses_its_full_range() -> None:
    values = normal()
    peak = float(values.abs().max())
    assert input_scale(values, peak, FP8, "absmax", EVEN) == pytest.approx(peak / 448)


def test_an_input_that_is_always_zero_has_a_scale() -> None:
    for name in CALIBRATORS:
        assert input_scale(torch.zeros(8, 64), 0.0, INT8, name, EVEN) > 0


def test_an_unknown_calibrator_is_refused_by_name() -> None:
    with pytest.raises(
        UsageError, match=r"Got the calibrator 'kl'; expected one of mse, percentile"
    ):
        input_scale(normal(), 3.0, INT8, "kl", EVEN)
