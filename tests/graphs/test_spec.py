"""Model and ring specs: validation, JSON, and the tables derived from them."""

import json
import math
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from graphs.contract import TensorSpec, capacity_letter, graph_inputs, graph_outputs
from graphs.dtypes import ELEMENT_TYPES
from graphs.errors import MistralcError
from graphs.rope import Rope, RopeScaling
from graphs.spec import AttentionSpec, ModelSpec, Multipliers, RingSpec
from tests.support.make_checkpoint import PRESETS, tiny_spec

MISTRAL_7B = PRESETS["mistral-7b-v0.1"]


# Validation


@pytest.mark.parametrize(
    "name",
    ["vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
     "num_key_value_heads", "head_dim", "max_position_embeddings"],
)  # fmt: skip
@pytest.mark.parametrize("value", [0, -1, 2.5, "64", True, None])
def test_a_size_must_be_a_whole_number_of_at_least_1(name: str, value: Any):
    with pytest.raises(MistralcError, match=f"{name} is .*expected a whole number of at least 1"):
        replace(tiny_spec(), **{name: value})


@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_a_constant_must_be_positive(name: str, value: float):
    with pytest.raises(MistralcError, match=f"{name} is .*above 0"):
        replace(tiny_spec(), **{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "6 query heads and 4 key/value"),
        ({"head_dim": 15}, "head_dim is 15; rotary embedding rotates pairs"),
        ({"layer_windows": (4,)}, "1 attention windows are given for 2 layers"),
        ({"layer_windows": (4, 0)}, "sliding window is 0; expected at least 1"),
        ({"num_hidden_layers": 0, "layer_windows": ()}, "num_hidden_layers is 0"),
    ],
)
def test_contradictory_fields_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(MistralcError, match=message):
        replace(tiny_spec(), **changes)


@pytest.mark.parametrize("name", ["chunk", "context", "max_batch"])
@pytest.mark.parametrize("value", [0, -3, 1.0, False])
def test_a_ring_size_must_be_a_whole_number_of_at_least_1(name: str, value: Any):
    with pytest.raises(MistralcError, match=f"ring's {name} is"):
        RingSpec(**{"chunk": 4, "context": 8, name: value})


def test_a_spec_is_frozen():
    with pytest.raises(FrozenInstanceError):
        tiny_spec().head_dim = 15


# JSON

LLAMA3 = RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=64)
LONGROPE = RopeScaling(
    rope_type="longrope", short_factor=(1.0, 2.0), long_factor=(1.0, 4.0), is_long=True
)
GEMMA = tiny_spec(
    attention=AttentionSpec(scale=0.1, softcap=50.0), multipliers=Multipliers(embedding=8.0),
    post_norms=True, activation="gelu_tanh", logit_softcap=30.0,
)  # fmt: skip


@pytest.mark.parametrize(
    "spec",
    [
        tiny_spec(),
        tiny_spec(window=5, tie_word_embeddings=True),
        tiny_spec(layer_windows=(4, None)),
        tiny_spec(rope_scaling=RopeScaling(rope_type="linear", factor=2.0)),
        tiny_spec(rope_scaling=LLAMA3),
        tiny_spec(rope_scaling=LONGROPE, rope=Rope(features=4, layers_without=(1,))),
        GEMMA,
        MISTRAL_7B,
    ],
)
def test_a_spec_survives_json(spec: ModelSpec):
    text = json.dumps(spec.to_json())
    assert ModelSpec.from_json(json.loads(text)) == spec


def test_a_mistrals_json_is_what_earlier_versions_wrote():
    """Manifests and fingerprints of bundles without the newer parts stay as they are."""
    data = tiny_spec(rope_scaling=LLAMA3).to_json()
    assert list(data) == [
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
        "rms_norm_eps", "rope_theta", "rope_scaling", "tie_word_embeddings", "layer_windows",
    ]  # fmt: skip
    assert list(data["rope_scaling"]) == [
        "rope_type", "factor", "low_freq_factor", "high_freq_factor",
        "original_max_position_embeddings",
    ]  # fmt: skip
    assert GEMMA.to_json().keys() - data.keys() == {
        "attention", "multipliers", "post_norms", "activation", "logit_softcap",
    }  # fmt: skip


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.update(rope={"features": 3}),
        lambda data: data.update(rope={"features": 18}),
        lambda data: data.update(rope={"layers_without": [-1]}),
        lambda data: data.update(attention={"bias": 1}),
        lambda data: data.update(attention={"softcap": 0}),
        lambda data: data.update(multipliers={"logits": -1.0}),
        lambda data: data.update(activation="relu"),
        lambda data: data.update(post_norms="yes"),
        lambda data: data.update(logit_softcap=math.nan),
        lambda data: data.update(
            rope_scaling={"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}
        ),
        lambda data: data.update(rope_scaling={"rope_type": "yarn", "is_long": 3}),
    ],
)
def test_parts_that_no_model_has_are_refused(damage: Any):
    data = tiny_spec().to_json()
    damage(data)
    with pytest.raises(MistralcError, match="Check"):
        ModelSpec.from_json(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("head_dim"),
        lambda data: data.pop("layer_windows"),
        lambda data: data.update(experts=8),
        lambda data: data.update(rope_scaling={"rope_type": "linear", "beta": 1}),
        lambda data: data.update(layer_windows=None),
    ],
)
def test_json_with_other_fields_is_refused_with_a_remedy(damage: Any):
    data = tiny_spec().to_json()
    damage(data)
    with pytest.raises(MistralcError, match="export the bundle again"):
        ModelSpec.from_json(data)


# Weights


def test_mistral_7b_has_7_241_732_096_parameters():
    assert MISTRAL_7B.num_parameters == 7_241_732_096  # published: 7.24 billion


def test_a_tied_embedding_is_counted_and_listed_once():
    untied, tied = tiny_spec(), tiny_spec(tie_word_embeddings=True)
    assert untied.weight_shapes().keys() - tied.weight_shapes().keys() == {"lm_head.weight"}
    assert untied.num_parameters - tied.num_parameters == 320 * 64


def test_parts_add_their_weights_and_biases_lie_side_by_side():
    """So that merged weights, and merged biases, are one range of the bundle's file each."""
    plain = tiny_spec(num_hidden_layers=1)
    biased = replace(plain, attention=AttentionSpec(bias=True, query_key_norms=True), mlp_bias=True)
    names = [name.removeprefix("model.layers.0.") for name in biased.weight_shapes()]
    start = names.index("self_attn.q_proj.weight")
    assert names[start : start + 8] == [
        *(f"self_attn.{part}_proj.weight" for part in "qkv"),
        *(f"self_attn.{part}_proj.bias" for part in "qkv"),
        "self_attn.q_norm.weight", "self_attn.k_norm.weight",
    ]  # fmt: skip
    added = set(names) - {n.removeprefix("model.layers.0.") for n in plain.weight_shapes()}
    assert {name for name in added if name.startswith("mlp.")} == {
        "mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias",
    }  # fmt: skip
    norms = replace(plain, post_norms=True).weight_shapes().keys() - plain.weight_shapes().keys()
    assert {name.rsplit(".", 2)[1] for name in norms} == {
        "pre_feedforward_layernorm", "post_feedforward_layernorm",
    }  # fmt: skip


def test_weights_have_hugging_face_names_and_shapes():
    spec = tiny_spec(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=24)
    layer = "model.layers.0."
    assert spec.weight_shapes() == {
        "model.embed_tokens.weight": (320, 64),
        layer + "input_layernorm.weight": (64,),
        layer + "self_attn.q_proj.weight": (96, 64),
        layer + "self_attn.k_proj.weight": (48, 64),
        layer + "self_attn.v_proj.weight": (48, 64),
        layer + "self_attn.o_proj.weight": (64, 96),
        layer + "post_attention_layernorm.weight": (64,),
        layer + "mlp.gate_proj.weight": (96, 64),
        layer + "mlp.up_proj.weight": (96, 64),
        layer + "mlp.down_proj.weight": (64, 96),
        "model.norm.weight": (64,),
        "lm_head.weight": (320, 64),
    }


# Windows, capacities and the table of inputs and outputs


def test_windows_are_listed_once_in_order_of_first_use():
    spec = tiny_spec(num_hidden_layers=5, layer_windows=(8, None, 8, 4, None))
    assert spec.windows == (8, None, 4)
    assert not spec.slides
    assert tiny_spec(layer_windows=(8, 4)).slides


def test_a_full_attention_ring_holds_the_context_in_whole_chunks():
    ring = RingSpec(chunk=8, context=20)
    assert ring.capacity(None) == 24
    assert ring.capacity(5) == 16  # at least 5 + 8 - 1


def test_capacity_letters_distinguish_windows_only_if_there_are_several():
    assert capacity_letter(tiny_spec(window=8), 8) == "C"
    assert capacity_letter(tiny_spec(), None) == "C"
    mixed = tiny_spec(layer_windows=(8, None))
    assert [capacity_letter(mixed, size) for size in mixed.windows] == ["C_8", "C_full"]


def test_inputs_and_outputs_are_those_of_the_contract():
    spec = tiny_spec(layer_windows=(8, None))

    def row(name: str, shape: tuple[int | str, ...], dtype: Any = "float16") -> TensorSpec:
        return TensorSpec(name=name, shape=shape, dtype=dtype)

    sliding, full = ("B", 2, "C_8", 16), ("B", 2, "C_full", 16)
    assert graph_inputs(spec, "float16") == (
        row("input_ids", ("B", "S"), "int64"),
        row("position_ids", ("B", "S"), "int64"),
        row("logits_indices", ("B", "T"), "int64"),
        row("past_key.0", sliding),
        row("past_value.0", sliding),
        row("past_key.1", full),
        row("past_value.1", full),
    )
    assert graph_outputs(spec, "float16") == (
        row("logits", ("B", "T", 320)),
        row("present_key.0", sliding),
        row("present_value.0", sliding),
        row("present_key.1", full),
        row("present_value.1", full),
    )


def test_every_dtype_of_the_table_has_a_size():
    spec = tiny_spec()
    for activation in ("float32", "float16", "bfloat16"):
        assert {t.dtype for t in graph_inputs(spec, activation)} <= ELEMENT_TYPES.keys()
