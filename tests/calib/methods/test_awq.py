"""AWQ's smoothing: exact in float, and better than none for inputs with outliers."""

import pytest
import torch

from calib.methods import awq
from calib.methods.clipping import (
    SCALE_DTYPE,
    block_moments,
    fit_scales,
    output_error,
    refine_scales,
    rescaled_moments,
)
from calib.methods.smoothing import smoothing_scales, tied
from exporter.quantization.recipe import SMOOTHING
from exporter.quantization.rounding import quantize
from graphs.quant_scheme import Offset, Scheme, groups, layer_groups
from tests.support import tiny
from tests.support.calibration_samples import folded, logits, observed, with_outliers
from tests.support.make_checkpoint import tiny_spec

INT4 = Scheme(codes="int4", block=32)
SPEC = tiny_spec()


def test_smoothing_with_clipping_beats_the_nearest_codes_for_inputs_with_outliers() -> None:
    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    seen = observed(with_outliers())
    s = awq.choose_smoothing(w, seen, INT4, lambda values: values)
    own = block_moments(seen.second_moment, INT4)
    found = fit_scales(w * s, rescaled_moments(own, s, INT4), INT4).dequantized() / s
    plain = quantize(w, INT4, SCALE_DTYPE).dequantized()
    clipped = fit_scales(w, own, INT4).dequantized()
    error = {
        name: output_error(v - w, seen.second_moment)
        for name, v in (("found", found), ("plain", plain), ("clipped", clipped))
    }
    # three features carry nearly all of the output: rounding them finely halves the error
    assert error["found"] < 0.5 * error["plain"]
    assert error["found"] < 0.7 * error["clipped"]


def test_the_features_with_the_largest_inputs_are_rounded_finest() -> None:
    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    s = awq.choose_smoothing(w, observed(with_outliers()), INT4, lambda values: values)
    assert set(s.topk(3).indices.tolist()) == {3, 40, 77}


def test_inputs_of_equal_magnitude_are_hardly_scaled() -> None:
    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2048, 96, generator=torch.Generator().manual_seed(2))
    s = awq.choose_smoothing(w, observed(x), INT4, lambda values: values)
    assert s.max() / s.min() < 2  # the ratio of the weight's columns


def test_clipping_costs_no_more_than_the_full_range() -> None:
    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    h = observed(with_outliers()).second_moment
    alone = torch.block_diag(*block_moments(h, INT4))  # no correlation between blocks
    plain = quantize(w, INT4, SCALE_DTYPE).dequantized()
    clipped = fit_scales(w, block_moments(h, INT4), INT4).dequantized()
    assert output_error(clipped - w, alone) < output_error(plain - w, alone)


@pytest.mark.parametrize("offset", ["none", "zero_point"])
def test_blocks_chosen_together_cost_less_than_blocks_chosen_alone(offset: Offset) -> None:
    scheme = Scheme(codes="int4", block=32, offset=offset)
    w = torch.randn(64, 80, generator=torch.Generator().manual_seed(1))  # a last block of 16
    h = observed(with_outliers()[:, :80]).second_moment
    apart = fit_scales(w, block_moments(h, scheme), scheme)
    together = refine_scales(w, apart, h)
    error = {found: output_error(q.dequantized() - w, h)
             for found, q in (("apart", apart), ("together", together))}  # fmt: skip
    assert error["together"] < 0.97 * error["apart"]
    again = refine_scales(w, together, h)
    assert output_error(again.dequantized() - w, h) <= error["together"] * (1 + 1e-6)


def test_block_moments_can_be_rescaled_instead_of_observed_again() -> None:
    x = with_outliers()
    s = torch.rand(96, generator=torch.Generator().manual_seed(5)) + 0.5
    for scheme in (INT4, Scheme(codes="int4", block=64), Scheme(codes="int8", block=None)):
        found = rescaled_moments(block_moments(observed(x).second_moment, scheme), s, scheme)
        # both are float32 sums of 512 products, in another order
        assert torch.allclose(
            found, block_moments(observed(x / s).second_moment, scheme), rtol=1e-4
        )


def test_query_heads_that_share_a_value_head_share_their_scales() -> None:
    group = layer_groups(SPEC, 0)[1]
    values = tied(torch.rand(64), group, SPEC).view(2, 2, 16)  # [K, H / K, D]
    assert torch.equal(values[:, 0], values[:, 1])


def test_folding_smoothing_into_the_weights_changes_nothing_in_float() -> None:
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for group in groups(SPEC):
        k = SPEC.weight_shapes()[group.readers[0]][1]
        size = tied(torch.rand(k, generator=generator) + 0.1, group, SPEC)
        tensors[group.name + SMOOTHING] = smoothing_scales(size, torch.ones(k), 1.0, 0.0)
    difference = logits(folded(SPEC, tensors)) - logits(tiny.decoder(SPEC))
    assert difference.abs().max() < 1e-4  # float32 rounding of two layers; 1e-5 was measured


def test_scales_are_bounded_around_a_mean_of_one() -> None:
    s = smoothing_scales(torch.tensor([1e-9, 1.0, 2.0, 1e9]), torch.ones(4), 1.0, 0.0)
    assert s.log().mean().abs() < 2  # not 0, because this extreme case hits the bound
    assert s.max() / s.min() <= 2.0**24
    assert torch.isfinite(smoothing_scales(torch.zeros(4), torch.zeros(4), 0.5, 0.5)).all()
