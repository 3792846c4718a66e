"""What is decided about the ring: no larger than the text that it can hold."""

from dataclasses import replace

import numpy as np
import pytest

from exporter.decide import decide
from exporter.estimate.model import estimate
from exporter.options import BuildOptions
from graphs.errors import UsageError
from graphs.spec import ModelSpec
from graphs.targets import TARGETS
from tests.support import tiny
from tests.support.make_checkpoint import tiny_spec

MINISTRAL_8B = ModelSpec(
    vocab_size=131_072, hidden_size=4096, intermediate_size=12_288, num_hidden_layers=36,
    num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=32_768,
    rms_norm_eps=1e-5, rope_theta=1e8, layer_windows=(None, 32_768, 32_768, 32_768) * 9,
)  # fmt: skip


def windows_of(spec: ModelSpec, **options: int) -> tuple[int | None, ...]:
    return decide(spec, TARGETS["rtx"], BuildOptions(**options)).spec.layer_windows


def test_a_layer_without_a_window_bounds_the_rings_of_all_others() -> None:
    needed = estimate(decide(MINISTRAL_8B, TARGETS["rtx"], BuildOptions()))
    assert needed.ring_slots == {None: 4096}
    assert needed.ring_bytes == 36 * 2 * 8 * 128 * 2 * 4096 == 603_979_776  # 3.83 GB with windows
    largest = estimate(decide(MINISTRAL_8B, TARGETS["rtx"], BuildOptions(context=32_768)))
    assert largest.ring_slots == {None: 32_768}


def test_windows_that_the_text_exceeds_stay() -> None:
    spec = replace(MINISTRAL_8B, layer_windows=(None, 1024, 4095, 4096) * 9)
    assert windows_of(spec) == (None, 1024, 4095, None) * 9
    assert windows_of(spec, context=1024) == (None,) * 36
    assert windows_of(spec, context=1025) == (None, 1024, None, None) * 9
    slides = replace(spec, layer_windows=(512, 1024) * 18)
    assert windows_of(slides) == slides.layer_windows, "there is no longest text"


def test_a_context_within_the_window_is_a_smaller_ring() -> None:
    spec = replace(MINISTRAL_8B, layer_windows=(4096,) * 36)
    build = decide(spec, TARGETS["rtx"], BuildOptions(context=1000))
    assert build.spec.layer_windows == (None,) * 36
    assert build.ring.capacity(None) == 1024
    assert build.ring.context == 1000
    mixed = replace(spec, layer_windows=(512, 4096) * 18)
    assert windows_of(mixed, context=1000) == (512, None) * 18
    for context in (4096, 5000):
        with pytest.raises(UsageError, match=r"window of 4096 tokens.*less than the window"):
            windows_of(spec, context=context)
    with pytest.raises(UsageError, match="window of at most 4096 tokens"):
        windows_of(mixed, context=4096)
    with pytest.raises(UsageError, match="trained for at most 32768"):
        windows_of(MINISTRAL_8B, context=32_769)


@pytest.mark.parametrize("length", [7, 8])
def test_a_layer_whose_window_is_left_out_computes_the_same(length: int) -> None:
    spec = tiny_spec(layer_windows=(8, None))
    bounded = decide(spec, TARGETS["cpu"], BuildOptions(context=8)).spec
    assert bounded.layer_windows == (None, None)
    ids = tiny.tokens(spec, length)
    expected, got = (tiny.at_once(tiny.decoder(one), ids) for one in (spec, bounded))
    np.testing.assert_array_equal(got, expected)
