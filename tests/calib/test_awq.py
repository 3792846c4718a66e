"""AWQ's smoothing: it costs nothing in float, and helps where inputs differ in size."""

import pytest
import torch

from calib.methods import awq
from calib.methods.clipping import STORED, fit, judge, output_error, rescaled, settle
from calib.methods.smoothing import scales, tied
from exporter.quantization.recipe import SMOOTHING
from exporter.quantization.rounding import quantize
from graphs.quant_scheme import Offset, Scheme, groups, layer_groups
from tests.support import tiny
from tests.support.calibration_samples import folded, logits, observed, with_outliers
from tests.support.make_checkpoint import tiny_spec

INT4 = Scheme(codes="int4", block=32)
SPEC = tiny_spec()


def test_smoothing_with_clipping_beats_the_nearest_codes_where_inputs_have_outliers() -> None:
    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    seen = observed(with_outliers())
    s = awq.smoothing(w, seen, INT4, lambda values: values)
    own = judge(seen.second_moment, INT4)
    found = fit(w * s, rescaled(own, s, INT4), INT4).dequantized() / s
    plain = quantize(w, INT4, STORED).dequantized()
    clipped = fit(w, own, INT4).dequantized()
    error = {
        name: output_error(v - w, seen.second_moment)
        for name, v in (("found", found), ("plain", plain), ("clipped", clipped))
    }
    # three features carry nearly all of the output: rounding them finely is worth a factor
    assert error["found"] < 0.5 * error["plain"]
    assert error["found"] < 0.7 * error["clipped"]


def test_the_features_with_the_largest_inputs_are_rounded_finest() -> None:
    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    s = awq.smoothing(w, observed(with_outliers()), INT4, lambda values: values)
    assert set(s.topk(3).indices.tolist()) == {3, 40, 77}


def test_inputs_of_one_size_are_left_nearly_alone() -> None:
    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2048, 96, generator=torch.Generator().manual_seed(2))
    s = awq.smoothing(w, observed(x), INT4, lambda values: values)
    assert s.max() / s.min() < 2  # what the weights' own columns differ by


def test_clipping_never_costs_more_than_the_whole_range() -> None:
    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    h = observed(with_outliers()).second_moment
    alone = torch.block_diag(*judge(h, INT4))  # inputs of different blocks taken as uncorrelated
    plain = quantize(w, INT4, STORED).dequantized()
    clipped = fit(w, judge(h, INT4), INT4).dequantized()
    assert output_error(clipped - w, alone) < output_error(plain - w, alone)


@pytest.mark.parametrize("offset", ["none", "zero_point"])
def test_blocks_that_know_of_each_other_cost_less(offset: Offset) -> None:
    scheme = Scheme(codes="int4", block=32, offset=offset)
    w = torch.randn(64, 80, generator=torch.Generator().manual_seed(1))  # a last block of 16
    h = observed(with_outliers()[:, :80]).second_moment
    apart = fit(w, judge(h, scheme), scheme)
    together = settle(w, apart, h)
    error = {found: output_error(q.dequantized() - w, h)
             for found, q in (("apart", apart), ("together", together))}  # fmt: skip
    assert error["together"] < 0.97 * error["apart"]
    again = settle(w, together, h)
    assert output_error(again.dequantized() - w, h) <= error["together"] * (1 + 1e-6)


def test_what_blocks_are_judged_by_follows_smoothing() -> None:
    x = with_outliers()
    s = torch.rand(96, generator=torch.Generator().manual_seed(5)) + 0.5
    for scheme in (INT4, Scheme(codes="int4", block=64), Scheme(codes="int8", block=None)):
        found = rescaled(judge(observed(x).second_moment, scheme), s, scheme)
        # both are float32 sums of 512 products, in another order
        assert torch.allclose(found, judge(observed(x / s).second_moment, scheme), rtol=1e-4)


def test_query_heads_that_share_a_value_head_share_their_scales() -> None:
    group = layer_groups(0)[1]
    values = tied(torch.rand(64), group, SPEC).view(2, 2, 16)  # [K, H / K, D]
    assert torch.equal(values[:, 0], values[:, 1])


def test_folding_changes_nothing_in_float() -> None:
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for group in groups(SPEC):
        k = SPEC.weight_shapes()[group.readers[0]][1]
        size = tied(torch.rand(k, generator=generator) + 0.1, group, SPEC)
        tensors[group.name + SMOOTHING] = scales(size, torch.ones(k), 1.0, 0.0)
    difference = logits(folded(SPEC, tensors)) - logits(tiny.decoder(SPEC))
    assert difference.abs().max() < 1e-4  # float32 of two layers: 1e-5 was seen


def test_scales_have_a_mean_of_one_and_a_bound() -> None:
    s = scales(torch.tensor([1e-9, 1.0, 2.0, 1e9]), torch.ones(4), 1.0, 0.0)
    assert s.log().mean().abs() < 2  # the bound moves it off zero in a case as wild as this
    assert s.max() / s.min() <= 2.0**24
    assert torch.isfinite(scales(torch.zeros(4), torch.zeros(4), 0.5, 0.5)).all()
