"""GPTQ against rounding to nearest, on weights and inputs that are made up."""

import pytest
import torch
from torch import Tensor

from calib.methods.clipping import STORED, judge, output_error
from calib.methods.clipping import fit as fit_blocks
from calib.methods.gptq import compensated, corrected
from exporter.quantization.rounding import Quantized, quantize
from graphs.quant_scheme import Scheme

SCHEMES = {
    "int4": Scheme(codes="int4", block=32),
    "int4 with zero points": Scheme(codes="int4", block=32, offset="zero_point"),
    "int4 with a short last block": Scheme(codes="int4", block=64),
    "int8": Scheme(codes="int8"),
    "fp8": Scheme(codes="float8e4m3"),
}


def fit(w: Tensor, h: Tensor, scheme: Scheme) -> Quantized:
    return fit_blocks(w, judge(h, scheme), scheme)


def weight(n: int = 48, k: int = 160) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(1))


def moment(k: int = 160, rank: int = 40) -> Tensor:
    """Inputs that are correlated, as activations are: most of them in a quarter of the space."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(512, rank, generator=generator) @ torch.randn(rank, k, generator=generator)
    x += 0.3 * torch.randn(512, k, generator=generator)
    return x.T @ x / len(x)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_it_beats_rounding_to_nearest_with_the_same_scales(scheme: Scheme) -> None:
    w, h = weight(), moment()
    nearest = fit(w, h, scheme)
    chosen = compensated(w, nearest, h)
    # a fifth less is far from chance: the rows' errors are 48 independent draws
    assert output_error(chosen.dequantized() - w, h) < 0.8 * output_error(
        nearest.dequantized() - w, h
    )


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_scales_stay_and_codes_stay_in_range(scheme: Scheme) -> None:
    w, h = weight(), moment()
    nearest = fit(w, h, scheme)
    chosen = compensated(w, nearest, h)
    assert torch.equal(chosen.scale, nearest.scale)
    assert chosen.codes.dtype == nearest.codes.dtype
    assert chosen.codes.shape == w.shape
    if scheme.codes == "int4":
        assert chosen.codes.min() >= -8
        assert chosen.codes.max() <= 7


def test_uncorrelated_inputs_leave_nothing_to_make_up_for() -> None:
    w = weight()
    nearest = quantize(w, SCHEMES["int4"], STORED)
    chosen = compensated(w, nearest, torch.eye(160))
    assert torch.equal(chosen.codes, nearest.codes)


def test_features_that_samples_never_touch_are_rounded_to_nearest() -> None:
    w, h = weight(), moment()
    h[5], h[:, 5] = 0, 0
    nearest = quantize(w, SCHEMES["int4"], STORED)
    assert torch.equal(compensated(w, nearest, h).codes[:, 5], nearest.codes[:, 5])


def test_fewer_samples_than_features_are_enough() -> None:
    w = weight()
    x = torch.randn(20, 160, generator=torch.Generator().manual_seed(3))
    h = x.T @ x / 20
    nearest = fit(w, h, SCHEMES["int4"])
    chosen = compensated(w, nearest, h)
    assert output_error(chosen.dequantized() - w, h) < output_error(nearest.dequantized() - w, h)


def test_what_earlier_groups_did_wrong_is_made_up_for() -> None:
    generator = torch.Generator().manual_seed(4)
    w = weight()
    ideal = torch.randn(2000, 160, generator=generator)
    given = ideal @ (torch.eye(160) + 0.05 * torch.randn(160, 160, generator=generator))
    h, drift = given.T @ given / 2000, given.T @ (ideal - given) / 2000
    better = corrected(w, h, drift, share=1.0)

    def off(v: Tensor) -> float:
        return float((given @ v.T - ideal @ w.T).square().mean())

    # the map is invertible, so but for the damping of 1% all of it can be made up for
    assert off(better) < 0.1 * off(w)
    assert torch.equal(corrected(w, h, drift, share=0.0), w)
