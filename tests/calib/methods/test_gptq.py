"""GPTQ compared with rounding to nearest, on synthetic weights and inputs."""

import pytest
import torch
from torch import Tensor

from calib.methods.clipping import SCALE_DTYPE, block_moments, fit_scales, output_error
from calib.methods.gptq import drift_corrected, gptq_codes
from exporter.checkpoint.quantized.value import Quantized
from exporter.quantization.rounding import quantize
from graphs.quant_scheme import Scheme

SCHEMES = {
    "int4": Scheme(codes="int4", block=32),
    "int4 with zero points": Scheme(codes="int4", block=32, offset="zero_point"),
    "int4 with a short last block": Scheme(codes="int4", block=64),
    "int8": Scheme(codes="int8"),
    "fp8": Scheme(codes="float8e4m3"),
}


def fit(w: Tensor, h: Tensor, scheme: Scheme) -> Quantized:
    return fit_scales(w, block_moments(h, scheme), scheme)


def weight(n: int = 48, k: int = 160) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(1))


def moment(k: int = 160, rank: int = 40) -> Tensor:
    """Second moment of correlated inputs, mostly in a quarter of the space, like activations."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(512, rank, generator=generator) @ torch.randn(rank, k, generator=generator)
    x += 0.3 * torch.randn(512, k, generator=generator)
    return x.T @ x / len(x)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_gptq_beats_rounding_to_nearest_with_the_same_scales(scheme: Scheme) -> None:
    w, h = weight(), moment()
    nearest = fit(w, h, scheme)
    chosen = gptq_codes(w, nearest, h)
    # 20% less is not chance: the errors of 48 rows are independent
    assert output_error(chosen.dequantized() - w, h) < 0.8 * output_error(
        nearest.dequantized() - w, h
    )


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_scales_stay_the_same_and_codes_stay_in_range(scheme: Scheme) -> None:
    w, h = weight(), moment()
    nearest = fit(w, h, scheme)
    chosen = gptq_codes(w, nearest, h)
    assert torch.equal(chosen.scale, nearest.scale)
    assert chosen.codes.dtype == nearest.codes.dtype
    assert chosen.codes.shape == w.shape
    if scheme.codes == "int4":
        assert chosen.codes.min() >= -8
        assert chosen.codes.max() <= 7


def test_uncorrelated_inputs_leave_nothing_to_compensate() -> None:
    w = weight()
    nearest = quantize(w, SCHEMES["int4"], SCALE_DTYPE)
    chosen = gptq_codes(w, nearest, torch.eye(160))
    assert torch.equal(chosen.codes, nearest.codes)


def test_features_that_are_always_zero_are_rounded_to_nearest() -> None:
    w, h = weight(), moment()
    h[5], h[:, 5] = 0, 0
    nearest = quantize(w, SCHEMES["int4"], SCALE_DTYPE)
    assert torch.equal(gptq_codes(w, nearest, h).codes[:, 5], nearest.codes[:, 5])


def test_fewer_samples_than_features_are_enough() -> None:
    w = weight()
    x = torch.randn(20, 160, generator=torch.Generator().manual_seed(3))
    h = x.T @ x / 20
    nearest = fit(w, h, SCHEMES["int4"])
    chosen = gptq_codes(w, nearest, h)
    assert output_error(chosen.dequantized() - w, h) < output_error(nearest.dequantized() - w, h)


def test_the_error_of_earlier_groups_is_corrected() -> None:
    generator = torch.Generator().manual_seed(4)
    w = weight()
    ideal = torch.randn(2000, 160, generator=generator)
    given = ideal @ (torch.eye(160) + 0.05 * torch.randn(160, 160, generator=generator))
    h, drift = given.T @ given / 2000, given.T @ (ideal - given) / 2000
    better = drift_corrected(w, h, drift, share=1.0)

    def off(v: Tensor) -> float:
        return float((given @ v.T - ideal @ w.T).square().mean())

    # the map is invertible, so everything can be corrected except for the damping of 1%
    assert off(better) < 0.1 * off(w)
    assert torch.equal(drift_corrected(w, h, drift, share=0.0), w)
