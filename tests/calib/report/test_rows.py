"""Rows of a report: the Pareto front, names, bytes read per token."""

from dataclasses import replace
from typing import Any

import pytest

from calib.report.rows import bundle_name, pareto_front, with_distinct_names
from graphs.manifest import Manifest
from graphs.quant_scheme import default_scheme, groups
from graphs.spec import ModelSpec, RingSpec
from runtime.bundle.sizes import read_bytes
from tests.calib.report.samples import (
    ALL,
    EIGHT,
    FLOAT,
    FOUR,
)
from tests.support.make_checkpoint import tiny_spec


def test_the_front_has_the_rows_that_no_other_beats_in_both_bytes_and_perplexity():
    assert pareto_front(ALL) == (FOUR, EIGHT, FLOAT)
    assert pareto_front(()) == ()
    equal = replace(EIGHT, name="the same bytes, worse", perplexity=10.2)
    assert pareto_front((equal, EIGHT)) == (EIGHT,)
    no_better = replace(EIGHT, name="more bytes, no better", read_bytes=EIGHT.read_bytes + 1)
    assert pareto_front((no_better, EIGHT)) == (EIGHT,)


def test_rows_of_equal_names_get_the_name_of_their_bundle():
    names = [one.name for one in with_distinct_names((EIGHT, FOUR, EIGHT), ("a", "b", "c"))]
    assert names == ["int8wo (a)", "int4wo awq", "int8wo (c)"]


def manifest_of(spec: ModelSpec, quantization: dict[str, Any] | None) -> Manifest:
    return Manifest(
        target="cpu", precision="int4wo", activation="float32", model=spec,
        ring=RingSpec(chunk=8, context=64), window_source="checkpoint", checkpoint={},
        versions={}, files={}, quantization=quantization,
    )  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_a_token_reads_every_weight_once_but_only_one_row_of_an_untied_embedding(tied: bool):
    spec = tiny_spec(tie_word_embeddings=tied)
    every = 4 * spec.num_parameters
    unread = 0 if tied else 4 * (spec.vocab_size - 1) * spec.hidden_size
    assert read_bytes(manifest_of(spec, None).build) == every - unread


def test_a_token_reads_the_codes_scales_and_zero_points_of_quantized_weights():
    spec = tiny_spec(tie_word_embeddings=True)
    scheme = default_scheme("int4wo", block=32, offset="zero_point")
    names = [name for group in groups(spec) for name in group.readers]
    stored = {"schemes": {name: scheme.to_json() for name in names},
              "layouts": dict.fromkeys(names, "nbits"), "method": "awq"}  # fmt: skip
    linears, expected = 0, 0
    for name in names:
        n, k = spec.weight_shapes()[name]
        blocks = k // 32  # 2 or 3, without padding
        linears += n * k
        expected += n * k // 2 + 4 * n * blocks + n * -(-blocks // 2)  # packed: two to a byte
    manifest = manifest_of(spec, stored)
    assert read_bytes(manifest.build) == expected + 4 * (spec.num_parameters - linears)
    assert bundle_name(manifest) == "int4wo awq block 32"
