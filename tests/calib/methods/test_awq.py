"""AWQ's smoothing: exact in float, and better than none for inputs with outliers."""

from typing import cast

import pytest
import torch

from calib.layers.layer_pass import quantized_layer, run_layer
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
from exporter.decoder.model import Layer
from exporter.quantization.recipe import SMOOTHING, Recipe
from exporter.quantization.reference import simulate
from exporter.quantization.rounding import quantize
from graphs.quant_scheme import Offset, Scheme, groups, layer_groups
from graphs.spec import AttentionSpec, ModelSpec, Multipliers
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


BIASES = tiny_spec(attention=AttentionSpec(bias=True, output_bias=True), mlp_bias=True)
GEMMA = tiny_spec(
    attention=AttentionSpec(softcap=5.0, query_key_norms=True), post_norms=True,
    activation="gelu_tanh", multipliers=Multipliers(embedding=3.0, residual=0.5),
)  # fmt: skip


FLOAT = Recipe(spec=BIASES, activation="float32")


def random_smoothing(spec: ModelSpec) -> dict[str, torch.Tensor]:
    generator, tensors = torch.Generator().manual_seed(3), {}
    for group in groups(spec):
        k = spec.weight_shapes()[group.readers[0]][1]
        size = tied(torch.rand(k, generator=generator) + 0.1, group, spec)
        tensors[group.name + SMOOTHING] = smoothing_scales(size, torch.ones(k), 1.0, 0.0)
    return tensors


@pytest.mark.parametrize("spec", [SPEC, BIASES, GEMMA], ids=["mistral", "biases", "gemma"])
def test_folding_smoothing_into_the_weights_changes_nothing_in_float(spec: ModelSpec) -> None:
    difference = logits(folded(spec, random_smoothing(spec))) - logits(tiny.decoder(spec))
    assert difference.abs().max() < 1e-4  # float32 rounding of two layers; 1e-5 was measured


def test_a_calibrated_layer_is_that_of_the_reference() -> None:
    """Both fold smoothing into quantized linears, float ones, and the biases of both."""
    schemes = {name: INT4 for group in groups(BIASES) for name in group.readers if "mlp" in name}
    tensors = random_smoothing(BIASES)
    recipe = Recipe(spec=BIASES, activation="float32", schemes=schemes, tensors=tensors)
    weight = tiny.weights(BIASES).__getitem__
    reference = simulate(recipe, weight)
    x = torch.randn(1, 9, BIASES.hidden_size, generator=torch.Generator().manual_seed(4))
    for index, expected in enumerate(reference.model.layers):
        layer = quantized_layer(recipe, index, weight, torch.device("cpu"))
        with torch.inference_mode():
            got = run_layer(reference, layer, x)
            wanted = run_layer(reference, cast(Layer, expected), x)
            plain = run_layer(reference, quantized_layer(FLOAT, index, weight, x.device), x)
        assert torch.allclose(got, wanted, atol=1e-5)
        assert not torch.allclose(got, plain, atol=1e-2), "4-bit codes are seen"


def test_scales_are_bounded_around_a_mean_of_one() -> None:
    s = smoothing_scales(torch.tensor([1e-9, 1.0, 2.0, 1e9]), torch.ones(4), 1.0, 0.0)
    assert s.log().mean().abs() < 2  # not 0, because this extreme case hits the bound
    assert s.max() / s.min() <= 2.0**24
    assert torch.isfinite(smoothing_scales(torch.zeros(4), torch.zeros(4), 0.5, 0.5)).all()
