"""Rounding weights to codes, and dequantizing them."""

import pytest
import torch

from exporter.checkpoint.quantized.value import blocked
from exporter.quantization.rounding import quantize
from graphs.quant_scheme import Scheme
from tests.exporter.quantization.schemes import SCHEMES, matrix


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_quantized_weight_is_within_half_a_step_of_the_weight(scheme: Scheme) -> None:
    weight = matrix(12, 192)
    found = quantize(weight, scheme, torch.float32)
    # e4m3 has three mantissa bits, so half a step is 1/16 of the value.
    half = found.scale.unsqueeze(-1) / 2
    if scheme.codes == "float8e4m3":
        half = torch.maximum(blocked(weight, scheme).abs() / 16, half)
    # Rounding the zero point shifts the range by up to another half step.
    allowed = 2 * half if scheme.offset == "zero_point" else half
    error = (blocked(found.dequantized() - weight, scheme)).abs()
    assert (error <= allowed * 1.0001).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_quantizing_a_dequantized_weight_changes_no_code(scheme: Scheme) -> None:
    once = quantize(matrix(8, 128), scheme, torch.float32)
    again = quantize(once.dequantized(), scheme, torch.float32, once.scale, once.zero_point)
    if scheme.offset != "minimum":  # the minimum is recomputed and may round differently
        assert torch.equal(once.codes.float(), again.codes.float())


def test_a_partial_last_block_has_its_own_scale() -> None:
    weight = matrix(4, 96)
    weight[:, 64:] *= 100
    found = quantize(weight, Scheme(codes="int4", block=64), torch.float32)
    assert found.scale.shape == (4, 2)
    assert (found.scale[:, 1] > 20 * found.scale[:, 0]).all()
    assert found.dequantized().shape == weight.shape
