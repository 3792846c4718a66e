"""The lowered graph of every family computes what the PyTorch decoder computes, on every target.

Llama's and Mistral's are compared in `test_lowered_numbers.py`. In float32 on ONNX Runtime CPU,
over four turns of the ring, with texts in three rows.
"""

from collections import Counter
from dataclasses import replace
from functools import cache

import onnx_ir as ir
import pytest

from exporter.decide import decide
from exporter.options import BuildOptions
from graphs.build import Build
from graphs.errors import UsageError
from graphs.passes.pipeline import PASSES, lower
from graphs.rope import Rope, RopeScaling
from graphs.spec import AttentionSpec, ModelSpec, Multipliers, RingSpec
from graphs.targets import TARGETS
from tests.support import tiny
from tests.support.lowered import check_numbers
from tests.support.make_checkpoint import tiny_spec

YARN = RopeScaling(
    rope_type="yarn", factor=8.0, original_max_position_embeddings=32, beta_fast=8.0,
    attention_factor=1.2,
)  # fmt: skip
FACTORS = tuple(1 + 0.1 * i for i in range(6))
BOTH = (8, None)  # a layer with a window and one without, which take different forms of attention

SPECS = {
    "qwen3": tiny_spec(
        vocab_size=64, layer_windows=BOTH, attention=AttentionSpec(query_key_norms=True)
    ),
    "ministral3": tiny_spec(
        vocab_size=64, layer_windows=BOTH, rope_scaling=YARN,
        rope=Rope(query_scale=0.3, query_scale_length=16),
    ),
    "phi4": tiny_spec(
        vocab_size=64, layer_windows=BOTH, rope=Rope(features=12),
        rope_scaling=RopeScaling(
            rope_type="longrope", short_factor=FACTORS, long_factor=FACTORS, attention_factor=1.1
        ),
    ),
    "gemma2": tiny_spec(
        vocab_size=64, layer_windows=BOTH, attention=AttentionSpec(scale=0.2, softcap=4.0),
        multipliers=Multipliers(embedding=8.0), post_norms=True, activation="gelu_tanh",
        logit_softcap=6.0,
    ),
    "granite, and qwen2's biases": tiny_spec(
        vocab_size=64, layer_windows=BOTH, mlp_bias=True, rope_scaling=YARN,
        attention=AttentionSpec(bias=True, output_bias=True, scale=0.11),
        multipliers=Multipliers(embedding=3.0, residual=0.22, logits=2.0),
    ),
    "smollm3": tiny_spec(
        vocab_size=64, num_hidden_layers=3, layer_windows=(8, None, 8),
        rope=Rope(layers_without=(1, 2)),
    ),
}  # fmt: skip
TURNS = [5, 1, 1, 39, 1, 1, 2, 1, 1, 1]
LENGTH = sum(TURNS) + 3
VARIANTS = ("cpu", "cuda", "rtx", "rtx, large ring")
SPLIT = {"ministral3", "phi4", "qwen3"}  # families that change queries and keys themselves


@cache
def lowered(name: str, variant: str, *, invariant: bool = False) -> tuple[ir.Model, Build]:
    spec, target = SPECS[name], TARGETS[variant.partition(",")[0]]
    if variant.endswith("large ring"):
        target = replace(target, max_in_place_slots=0)
    ring = RingSpec(chunk=3, context=LENGTH)
    build = tiny.build(spec, target.name, ring=ring, batch_invariant=invariant)
    build = replace(build, target=target)
    model = tiny.traced(spec)
    lower(model, build)
    return tiny.fill(model, spec), build


CASES = [
    (name, variant) for name, spec in SPECS.items() for variant in VARIANTS
    if spec.attention.softcap is None or "rtx" not in variant
]  # fmt: skip


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_the_lowered_graph_computes_what_the_pytorch_decoder_computes(
    name: str, variant: str
) -> None:
    model, build = lowered(name, variant)
    check_numbers(model, build, tiny.decoder(build.spec), 3, TURNS)


def test_both_kinds_of_engine_have_the_same_graph() -> None:
    assert PASSES["rtx"] == PASSES["tensorrt"]


@pytest.mark.parametrize("name", SPECS)
def test_layers_take_the_operators_that_mistral_has(name: str) -> None:
    model, build = lowered(name, "cpu")
    spec, found = build.spec, Counter(node.op_type for node in model.graph)
    unwindowed = spec.layer_windows.count(None)
    assert found["GroupQueryAttention"] == unwindowed
    assert found["Attention"] == spec.num_hidden_layers - unwindowed
    assert found["SkipSimplifiedLayerNormalization"] == 2 * spec.num_hidden_layers - 1
    assert found["FusedMatMul"] == 4 * spec.num_hidden_layers + 1, "q, k, v and gate, up merged"
    for node in model.graph:
        if node.op_type == "GroupQueryAttention":
            assert (node.inputs[1] is None) is (name not in SPLIT), "keys beside queries"


def test_padded_queries_leave_the_result_as_it_is() -> None:
    """With keys and values apart from queries, all three are padded."""
    model, build = lowered("qwen3", "cpu", invariant=True)
    assert sum(node.op_type == "Pad" for node in model.graph) >= 3
    session = tiny.load(ir.to_proto(model).SerializeToString(), build.spec, padded=1)
    ids = tiny.tokens(build.spec, 40)
    got = tiny.in_turns(session, tiny_ring(build), ids, [13, 1, 1, 25])
    expected = tiny.at_once(tiny.decoder(build.spec), ids)
    assert abs(got - expected).max() <= 2e-5 * abs(expected).max()  # as in `lowered.py`


def tiny_ring(build: Build) -> tiny.Ring:
    return tiny.Ring(build.spec, build.ring)


# What a target cannot compute


@pytest.mark.parametrize("target", TARGETS)
def test_a_soft_cap_of_scores_is_refused_where_attention_takes_none(target: str) -> None:
    spec, one = SPECS["gemma2"], TARGETS[target]
    if one.caps_scores:
        assert decide(spec, one, BuildOptions()).spec == spec
        return
    with pytest.raises(UsageError, match=rf"Gemma 2 .*--target {target} cannot.*cpu or cuda"):
        decide(spec, one, BuildOptions())


def decided(**changes: object) -> ModelSpec:
    spec = tiny_spec(
        max_position_embeddings=512, layer_windows=(None, None),
        rope_scaling=RopeScaling(
            rope_type="longrope", short_factor=(1.0,) * 8, long_factor=(4.0,) * 8,
            original_max_position_embeddings=128,
        ),
    )  # fmt: skip
    return decide(spec, TARGETS["cpu"], BuildOptions(**changes)).spec  # type: ignore[arg-type]


def test_the_context_chooses_the_factors_of_longrope() -> None:
    """A ring keeps keys as they were rotated, so a bundle has one set of factors."""
    scalings = {n: decided(context=n).rope_scaling for n in (128, 129)}
    assert [one is not None and one.is_long for one in scalings.values()] == [False, True]
    short, long = scalings.values()
    assert short is not None
    assert long is not None
    assert (short.factors[0], long.factors[0]) == (1.0, 4.0)
    assert "up to 128 tokens" in str(short.note)
    assert "more than 128 tokens" in str(long.note)
    sliding = decided(window=64).rope_scaling
    assert sliding is not None
    assert sliding.is_long, "text without end is longer than any trained text"
