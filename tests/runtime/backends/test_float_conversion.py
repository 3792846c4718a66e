"""Half-precision logits convert to float32 exactly, for all 65,536 bit patterns."""

import ml_dtypes
import numpy as np
import pytest

from graphs.dtypes import Dtype
from runtime.backends.float_conversion import to_float32

BITS = np.arange(1 << 16, dtype=np.uint16)


@pytest.mark.parametrize(
    ("activation", "dtype"), [("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)]
)
def test_every_bit_pattern_is_converted_exactly(activation: Dtype, dtype: type):
    found = np.full(BITS.size, 7, np.float32)
    to_float32(BITS.view(np.uint8), activation, found)
    expected = BITS.view(dtype).astype(np.float32)
    number = ~np.isnan(expected)
    assert number.sum() > 60_000
    np.testing.assert_array_equal(found.view(np.uint32)[number], expected.view(np.uint32)[number])
    assert np.isnan(found[~number]).all()


def test_float32_passes_unchanged():
    numbers = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    found = np.empty_like(numbers)
    to_float32(numbers.view(np.uint8), "float32", found)
    np.testing.assert_array_equal(found, numbers)
