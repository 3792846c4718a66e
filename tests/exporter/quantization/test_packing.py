"""Packing codes into the layouts of the weights file, and back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exporter.quantization.packing import pack, pack_int4, unpack, unpack_int4
from exporter.quantization.rounding import quantize
from graphs.quant_scheme import Scheme, stored_parts
from graphs.targets import CodeLayout
from tests.exporter.quantization.schemes import SCHEMES, matrix


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**31))
def test_unpacking_restores_packed_codes(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (rows, columns), dtype=torch.int8, generator=generator)
    assert torch.equal(unpack_int4(pack_int4(codes))[:, :columns], codes)


@pytest.mark.parametrize("layout", ["onnx", "transposed", "nbits"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_unpacking_restores_a_packed_weight_and_parts_have_the_stated_shapes(
    scheme: Scheme, layout: CodeLayout
) -> None:
    if layout == "nbits" and (scheme.block is None or scheme.codes == "float8e4m3"):
        pytest.skip("MatMulNBits takes blocks of integers only")
    if layout == "onnx" and scheme.offset == "zero_point":
        pytest.skip("only MatMulNBits takes zero points")
    if layout == "transposed" and scheme.offset != "none":
        with pytest.raises(ValueError, match="cannot be transposed"):
            list(stored_parts("w", (6, 96), scheme, "float32", layout))
        return
    weight = quantize(matrix(6, 96), scheme, torch.float32)
    parts = pack(weight, torch.float32, layout)
    stated = list(stored_parts("w", (6, 96), scheme, "float32", layout))
    shapes = [p.shape if p.element != "int4" else (*p.shape[:-1], p.shape[-1] // 2) for p in stated]
    assert [tuple(part.shape) for part in parts] == shapes
    back = unpack(parts, (6, 96), scheme, layout)
    assert torch.equal(back.dequantized(), weight.dequantized())
