"""Configurations into ModelSpec: what is read, and what is refused by name."""

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MinistralConfig, MistralConfig

from exporter.checkpoint.config_gguf import spec_from_gguf
from exporter.checkpoint.config_hf import override_window, spec_from_hf
from exporter.checkpoint.config_mistral import spec_from_params
from graphs.errors import MistralcError, UsageError
from graphs.rope import Rope, RopeScaling
from graphs.spec import ModelSpec
from tests.support.make_checkpoint import PRESETS, hf_config, mistral_params, tiny_spec

LLAMA3 = RopeScaling(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


def hf(**changes: Any) -> dict[str, Any]:
    """A small Mistral's config.json; a change to `...` removes the key."""
    values = hf_config(tiny_spec(window=8)) | changes
    return {key: value for key, value in values.items() if value is not ...}


def llama(**changes: Any) -> dict[str, Any]:
    base = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "sliding_window": None}
    return hf(**(base | changes))


def params(**changes: Any) -> dict[str, Any]:
    values = mistral_params(tiny_spec()) | changes
    return {key: value for key, value in values.items() if value is not ...}


def gguf(**changes: Any) -> dict[str, Any]:
    """GGUF metadata of a small model; `__` in a name means a dot."""
    values: dict[str, Any] = {
        "general.architecture": "llama", "llama.block_count": 2, "llama.context_length": 512,
        "llama.embedding_length": 64, "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
        "llama.vocab_size": 320, "tokenizer.ggml.model": "gpt2",
    }  # fmt: skip
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in values.items() if value is not ...}


def from_gguf(**changes: Any) -> ModelSpec:
    return spec_from_gguf(gguf(**changes), tied=False)


# Hugging Face


def test_mistral_7b_v01_reads_as_published() -> None:
    published = {
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
        "vocab_size": 32000,
    }  # fmt: skip
    spec = spec_from_hf(published)
    assert spec == PRESETS["mistral-7b-v0.1"]
    assert spec.num_parameters == 7_241_732_096


@pytest.mark.parametrize(
    ("four", "five", "scaling"),
    [
        (None, {"rope_type": "default"}, None),
        (
            {"type": "linear", "factor": 4},
            {"rope_type": "linear", "factor": 4.0},
            RopeScaling(rope_type="linear", factor=4.0),
        ),
        (
            tiny_spec(rope_scaling=LLAMA3).to_json()["rope_scaling"],
            tiny_spec(rope_scaling=LLAMA3).to_json()["rope_scaling"],
            LLAMA3,
        ),
    ],
    ids=["plain", "linear", "llama3"],
)  # fmt: skip
def test_both_spellings_of_rotary_embedding_give_the_same_spec(
    four: dict[str, Any] | None, five: dict[str, Any], scaling: RopeScaling | None
) -> None:
    old = spec_from_hf(hf(rope_theta=500_000, rope_scaling=four))
    new = hf(rope_theta=..., rope_scaling=..., rope_parameters={"rope_theta": 5e5, **five})
    assert old == spec_from_hf(new)
    assert (old.rope_theta, old.rope_scaling) == (500_000.0, scaling)
    both = {**new, "rope_theta": 5e5, "rope_scaling": four}
    if four is not None:
        assert spec_from_hf(both) == old


@pytest.mark.parametrize("config", [MistralConfig, LlamaConfig, MinistralConfig])
def test_what_transformers_5_writes_is_read(config: Any) -> None:
    written = json.loads(config(num_hidden_layers=2).to_json_string(use_diff=False))
    spec = spec_from_hf(written)
    assert spec.hidden_size == 4096
    assert spec.layer_windows == ((None, None) if config is LlamaConfig else (4096, 4096))
    assert (spec.head_dim, spec.rope_theta, spec.rope_scaling) == (128, 10_000.0, None)


def test_head_dim_is_taken_from_the_file_or_divided() -> None:
    assert spec_from_hf(hf(head_dim=24)).head_dim == 24
    assert spec_from_hf(hf(head_dim=None)).head_dim == 16
    assert spec_from_hf(hf(head_dim=...)).head_dim == 16
    with pytest.raises(MistralcError, match=r"head_dim.*66 is not a multiple of the 4"):
        spec_from_hf(hf(head_dim=..., hidden_size=66))


def test_the_sliding_window_means_what_it_means_to_transformers() -> None:
    assert spec_from_hf(hf(sliding_window=8)).layer_windows == (8, 8)
    assert spec_from_hf(hf(sliding_window=None)).layer_windows == (None, None)
    # Absent is not null: MistralConfig then uses its default, 4096.
    absent = hf(sliding_window=...)
    assert spec_from_hf(absent).layer_windows == (4096, 4096)
    assert MistralConfig.from_dict(dict(absent)).sliding_window == 4096
    assert spec_from_hf(llama(sliding_window=...)).layer_windows == (None, None)


@pytest.mark.parametrize("name", ["Mistral", "Ministral"])
def test_layer_types_interleave_windows(name: str) -> None:
    kinds = ["full_attention", "sliding_attention"]
    config = hf(
        architectures=[f"{name}ForCausalLM"], model_type=name.lower(), layer_types=kinds
    )  # fmt: skip
    assert spec_from_hf(config).layer_windows == (None, 8)


def test_a_ministral_without_layer_types_slides_everywhere() -> None:
    config = hf(architectures=["MinistralForCausalLM"], model_type="ministral")
    assert spec_from_hf(config).layer_windows == (8, 8)


def test_kv_heads_default_as_the_architecture_does() -> None:
    assert spec_from_hf(llama(num_key_value_heads=...)).num_key_value_heads == 4
    assert spec_from_hf(hf(num_key_value_heads=None)).num_key_value_heads == 4
    with pytest.raises(MistralcError, match="num_key_value_heads"):
        spec_from_hf(hf(num_key_value_heads=...))


def test_the_architecture_may_be_named_by_model_type_alone() -> None:
    assert spec_from_hf(hf(architectures=...)) == spec_from_hf(hf(model_type=...))


def test_settings_without_effect_are_accepted() -> None:
    harmless = hf(
        attention_bias=False, mlp_bias=False, num_local_experts=0, partial_rotary_factor=1.0,
        quantization_config=None, use_cache=True, attention_dropout=0.0, pretraining_tp=2,
    )  # fmt: skip
    assert spec_from_hf(harmless) == spec_from_hf(hf())


REFUSED_HF: list[tuple[dict[str, Any], str]] = [
    (hf(architectures=["MixtralForCausalLM"]), "MixtralForCausalLM"),
    (hf(architectures=["MistralForSequenceClassification"]), "MistralForSequenceClassification"),
    (hf(architectures="MistralForCausalLM"), "architectures"),
    (hf(architectures=[3]), "architecture is 3"),
    (hf(architectures=["MistralForCausalLM", "LlamaForCausalLM"]), "architectures"),
    (hf(architectures=..., model_type=...), "model_type"),
    (hf(architectures=..., model_type="qwen2_moe"), "qwen2_moe"),
    (hf(model_type="mixtral"), "mixtral"),
    (hf(attention_bias=True), "attention_bias"),
    (hf(mlp_bias=True), "mlp_bias"),
    (hf(num_local_experts=8), "num_local_experts"),
    (hf(num_experts=8), "num_experts"),
    (hf(moe={"num_experts": 8}), "moe"),
    (hf(use_qk_norm=True), "use_qk_norm"),
    (hf(text_config={}, vision_config={"depth": 1}), "config"),
    (hf(hidden_act="gelu"), "gelu"),
    (hf(hidden_act=1), "hidden_act"),
    (hf(partial_rotary_factor=0.5), "partial_rotary_factor"),
    (hf(tie_word_embeddings="yes"), "tie_word_embeddings"),
    (hf(vocab_size=...), "vocab_size"),
    (hf(hidden_size="64"), "hidden_size"),
    (hf(hidden_size=64.0), "hidden_size"),
    (hf(hidden_size=True), "hidden_size"),
    (hf(hidden_size=2**40), "hidden_size"),
    (hf(intermediate_size=0), "intermediate_size"),
    (hf(num_hidden_layers=10**9), "num_hidden_layers"),
    (hf(num_attention_heads=-4), "num_attention_heads"),
    (hf(num_key_value_heads=3), "key/value"),
    (hf(head_dim=15), "head_dim"),
    (hf(max_position_embeddings=...), "max_position_embeddings"),
    (hf(rms_norm_eps=...), "rms_norm_eps"),
    (hf(rms_norm_eps=float("nan")), "rms_norm_eps"),
    (hf(rope_theta=float("inf")), "rope_theta"),
    (hf(rope_theta=10**400), "rope_theta"),
    (hf(sliding_window=0), "sliding_window"),
    (hf(sliding_window="4096"), "sliding_window"),
    (llama(sliding_window=4096), "LlamaForCausalLM"),
    (hf(layer_types=["full_attention"]), "layer_types"),
    (hf(layer_types=["full_attention", "chunked_attention"]), "chunked_attention"),
    (hf(layer_types=["full_attention", "sliding_attention"], sliding_window=None), "layer_types"),
    (hf(rope_scaling="linear"), "rope_scaling"),
    (hf(rope_scaling={"type": "yarn"} | {"beta_fast": 1.0, "beta_slow": 2.0}), "beta_fast"),
    (hf(rope_scaling={"type": "yarn", "factor": 4.0, "llama_4_scaling_beta": 0.1}), "llama_4"),
    (hf(rope_scaling={"type": "longrope", "factor": 4.0}), "short_factor"),
    (hf(rope_scaling={"type": "longrope", "short_factor": [1.0], "long_factor": [0]}), "long_fac"),
    (hf(rope_scaling={"type": "su", "short_factor": [1.0], "long_factor": [2.0]}), "1 factors for"),
    (hf(rope_scaling={"rope_type": "dynamic", "factor": 4.0}), "dynamic"),
    (hf(rope_scaling={"rope_type": "linear", "type": "yarn", "factor": 4.0}), "linear/yarn"),
    (hf(rope_scaling={"factor": 4.0}), "factor"),
    (hf(rope_scaling={"type": "linear"}), "factor"),
    (hf(rope_scaling={"type": "linear", "factor": 4.0, "mscale": 1.0}), "mscale"),
    (hf(rope_scaling={"type": "llama3", "factor": 8.0}), "low_freq_factor"),
    (hf(rope_scaling={
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0,
        "original_max_position_embeddings": 8192}), "high_freq_factor"),
    (hf(rope_theta=1e4, rope_parameters={"rope_theta": 1e6}), "contradict"),
    (hf(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
     "partial_rotary_factor"),
    (hf(rope_parameters={"full_attention": {"rope_theta": 1e4}}), "full_attention"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "named"), REFUSED_HF, ids=lambda v: v if type(v) is str else "")
def test_a_config_beyond_the_architecture_is_refused_by_name(
    config: dict[str, Any], named: str
) -> None:
    with pytest.raises(MistralcError, match=named) as caught:
        spec_from_hf(config)
    assert any(word in str(caught.value) for word in ("expected", "supported", "needs"))
    assert "\n" not in str(caught.value)


# params.json


def test_params_give_the_same_spec_as_config() -> None:
    spec = tiny_spec(head_dim=24, tie_word_embeddings=True, window=8)
    assert spec_from_params(mistral_params(spec)) == spec == spec_from_hf(hf_config(spec))


def test_params_repeat_a_list_of_windows_over_the_layers() -> None:
    spec = spec_from_params(params(n_layers=6, sliding_window=[None, 8, 8]))
    assert spec.layer_windows == (None, 8, 8, None, 8, 8)
    alias = params(n_layers=6, sliding_window=None, _sliding_window=[None, 8, 8])
    assert spec_from_params(alias) == spec


def test_params_without_theta_mean_a_million_and_with_a_window_ten_thousand() -> None:
    assert spec_from_params(params(rope_theta=...)).rope_theta == 1e6
    assert spec_from_params(params(rope_theta=None)).rope_theta == 1e6
    assert spec_from_params(params(rope_theta=..., sliding_window=8)).rope_theta == 1e4


def test_params_without_a_context_get_that_of_the_reference_code() -> None:
    spec = spec_from_params(params(max_position_embeddings=...))
    assert spec.max_position_embeddings == 128_000
    shorter = params(max_position_embeddings=..., max_seq_len=4096)
    assert spec_from_params(shorter).max_position_embeddings == 4096


YARN = {"factor": 16.0, "original_max_position_embeddings": 64, "beta": 32.0, "alpha": 1.0,
        "apply_scale": False}  # fmt: skip


def test_params_of_ministral_3_have_yarn_and_scaled_queries() -> None:
    """As vLLM and llama.cpp read them: beta and alpha are the turns, `apply_scale` the factor."""
    scaled = {"original_max_position_embeddings": 64, "beta": 0.1}
    spec = spec_from_params(params(yarn=YARN, llama_4_scaling=scaled, vision_encoder={"dim": 8}))
    yarn = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64,
            "beta_fast": 32.0, "beta_slow": 1.0}  # fmt: skip
    assert spec.rope_scaling == RopeScaling(**yarn)
    assert spec.rope == Rope(query_scale=0.1, query_scale_length=64)
    applied = spec_from_params(params(yarn=YARN | {"apply_scale": True})).rope_scaling
    assert applied == RopeScaling(**yarn, attention_factor=0.1 * math.log(16) + 1)


REFUSED_PARAMS: list[tuple[dict[str, Any], str]] = [
    (params(moe={"num_experts": 8, "num_experts_per_tok": 2}), "moe"),
    (params(lora={"rank": 8}), "lora"),
    (params(yarn={"factor": 16}), "original_max_position_embeddings"),
    (params(yarn=YARN | {"extra": 1}), "extra"),
    (params(llama_4_scaling={"beta": 0.1}), "original_max_position_embeddings"),
    (params(audio={"hidden_size": 8}), "audio"),
    (params(qk_norm=True), "qk_norm"),
    (params(model_type="mamba"), "mamba"),
    (params(activation="gelu"), "gelu"),
    (params(attention_temperature=2.0), "attention_temperature"),
    (params(dim=...), "dim"),
    (params(n_heads="4"), "n_heads"),
    (params(n_layers=10**9), "n_layers"),
    (params(n_kv_heads=None), "n_kv_heads"),
    (params(norm_eps=-1.0), "norm_eps"),
    (params(rope_theta="1e4"), "rope_theta"),
    (params(tied_embeddings=1), "tied_embeddings"),
    (params(sliding_window=[]), "sliding_window"),
    (params(sliding_window=[8, 8, 8]), "sliding_window"),
    (params(sliding_window=[8, 0]), "sliding_window"),
    (params(sliding_window=[8, True]), "sliding_window"),
    (params(sliding_window=8, _sliding_window=8), "_sliding_window"),
]


@pytest.mark.parametrize(
    ("config", "named"), REFUSED_PARAMS, ids=lambda v: v if type(v) is str else ""
)
def test_params_beyond_the_architecture_are_refused_by_name(
    config: dict[str, Any], named: str
) -> None:
    with pytest.raises(MistralcError, match=f"`{named}|is {named}"):
        spec_from_params(config)


# GGUF


def test_gguf_metadata_gives_the_same_spec_as_config() -> None:
    expected = tiny_spec()
    assert from_gguf() == expected  # among others: float32's 1e-5 is 1e-5 again
    assert spec_from_gguf(gguf(), tied=True).tie_word_embeddings
    words = gguf(llama__vocab_size=..., tokenizer__ggml__tokens=["a"] * 320)
    assert spec_from_gguf(words, tied=False) == expected
    lists = from_gguf(llama__attention__head_count=[4, 4], llama__attention__head_count_kv=[2, 2])
    assert lists == expected


def test_gguf_settings_are_read() -> None:
    spec = from_gguf(
        llama__attention__key_length=24, llama__attention__value_length=24,
        llama__rope__dimension_count=24, llama__rope__freq_base=1e6,
        llama__attention__sliding_window=8, llama__rope__scaling__type="linear",
        llama__rope__scaling__factor=4.0, llama__expert_count=0,
    )  # fmt: skip
    scaling = RopeScaling(rope_type="linear", factor=4.0)
    assert spec == tiny_spec(head_dim=24, rope_theta=1e6, window=8, rope_scaling=scaling)
    assert from_gguf(llama__attention__head_count_kv=...).num_key_value_heads == 4
    assert from_gguf(llama__attention__sliding_window=0).layer_windows == (None, None)
    assert from_gguf(llama__rope__scale_linear=4.0).rope_scaling == scaling
    unscaled = {"llama__rope__scaling__type": "none", "llama__rope__scaling__factor": 4.0}
    assert from_gguf(**unscaled).rope_scaling is None
    assert from_gguf(llama__rope__scaling__factor=1.0).rope_scaling is None


REFUSED_GGUF: list[tuple[dict[str, Any], str]] = [
    ({"general__architecture": "mistral4"}, "mistral4"),
    ({"general__architecture": "qwen2"}, "qwen2.embedding_length"),
    ({"general__architecture": ...}, "general.architecture"),
    ({"llama__expert_count": 8}, "expert_count"),
    ({"llama__attention__causal": False}, "attention.causal"),
    ({"llama__attention__scale": 0.5}, "llama.attention.scale"),
    ({"llama__logit_scale": 0.5}, "llama.logit_scale"),
    ({"llama__rope__scaling__type": "longrope"}, "longrope"),
    ({"llama__rope__scaling__attn_factor": 1.5}, "attn_factor"),
    ({"llama__rope__dimension_count": 8}, "rope.dimension_count"),
    ({"llama__attention__value_length": 8}, "value_length"),
    ({"llama__attention__head_count": [4, 2]}, "head_count"),
    ({"llama__block_count": ...}, "block_count"),
    ({"llama__block_count": 10**6}, "block_count"),
    ({"llama__vocab_size": ...}, "vocab_size"),
    ({"llama__context_length": "512"}, "context_length"),
    ({"llama__attention__layer_norm_rms_epsilon": ...}, "layer_norm_rms_epsilon"),
    ({"llama__attention__sliding_window": 8.5}, "sliding_window"),
]


@pytest.mark.parametrize(("changes", "named"), REFUSED_GGUF, ids=[n for _, n in REFUSED_GGUF])
def test_gguf_metadata_beyond_the_architecture_is_refused_by_name(
    changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(MistralcError, match=named):
        from_gguf(**changes)


# Any input


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["linear", "llama3", "default", "silu", "sliding_attention", "llama"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["rope_type", "type", "factor", "rope_theta", "num_experts"]), inner
    ),
    max_leaves=6,
)  # fmt: skip
READERS = {"hf": (spec_from_hf, hf()), "params": (spec_from_params, params()),
           "gguf": (lambda values: spec_from_gguf(values, tied=False), gguf())}  # fmt: skip


@pytest.mark.parametrize("kind", READERS)
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_values_give_a_spec_or_a_clear_error(kind: str, data: st.DataObject) -> None:
    read, base = READERS[kind]
    extra = ["rope_parameters", "layer_types", "rope_theta", "llama.rope.scaling.factor"]
    changes = data.draw(st.dictionaries(st.sampled_from([*base, *extra]), JSON, max_size=4))
    try:
        spec = read(base | changes)
    except MistralcError as error:
        assert str(error).count("\n") == 0  # noqa: PT017 - either outcome is right
    else:
        assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@given(st.dictionaries(st.text(max_size=12), JSON, max_size=6))
def test_a_random_object_is_never_a_config(values: dict[str, Any]) -> None:
    with pytest.raises(MistralcError):
        spec_from_hf(values)


def test_a_window_from_the_command_line_replaces_every_layers() -> None:
    spec = tiny_spec(num_hidden_layers=3, layer_windows=(None, 8, None))
    assert override_window(spec, 64).layer_windows == (64, 64, 64)
    with pytest.raises(UsageError, match="--window is 0"):
        override_window(spec, 0)
