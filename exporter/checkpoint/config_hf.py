"""Read a Hugging Face `config.json` into a ModelSpec. Knows nothing about weights or torch.

Both spellings are read, those of transformers 4 and 5. A setting that this decoder does not
compute is an error that names it, and never ignored: biases, experts, other activations, other
rotary scalings, partial rotary embedding. How weights are quantized is read in `quantized/`.
`config_mistral.py` reads Mistral's `params.json`, `config_gguf.py` GGUF metadata.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from exporter.checkpoint.fields import Fields
from graphs.errors import MistralcError, UsageError
from graphs.spec import ModelSpec, RopeScaling

Window = int | None

MAX_LAYERS = 1000  # published decoders have fewer than 150; a damaged number must not fill memory
USE_ANOTHER = "Only the dense Mistral architecture is supported: use another checkpoint."

# The model that each architecture selects in transformers 5 (models/mistral, models/ministral and
# models/llama). All three are the same decoder, and differ in windows and defaults.
_FAMILIES = {
    "MistralForCausalLM": "mistral",
    "MinistralForCausalLM": "ministral",
    "LlamaForCausalLM": "llama",
}
_DEFAULT_WINDOW = 4096  # of MistralConfig and MinistralConfig in transformers, if the key is absent
DEFAULT_THETA = 10_000.0  # transformers, and llama.cpp for GGUF
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe")
_BIASES = ("attention_bias", "mlp_bias", "use_bias", "qkv_bias")
_QK_NORMS = ("qk_norm", "use_qk_norm")


def override_window(spec: ModelSpec, window: int) -> ModelSpec:
    """Give every layer a sliding window of `window` tokens (`--window`)."""
    if window < 1:
        raise UsageError(f"--window is {window}; expected at least 1 token.")
    return replace(spec, layer_windows=(window,) * spec.num_hidden_layers)


def layer_count(fields: Fields, key: str) -> int:
    """Read the number of layers, and refuse an impossible one before anything is sized by it."""
    layers = fields.integer(key)
    if layers > MAX_LAYERS:
        raise fields.invalid(key, f"at most {MAX_LAYERS} layers")
    return layers


def head_size(fields: Fields, key: str, hidden: int, heads: int) -> int:
    """Read D, which defaults to hidden size / heads if the first is a multiple of the second."""
    if fields.has(key):
        return fields.integer(key)
    if hidden % heads:
        raise MistralcError(
            f"{fields.origin}: `{key}` is missing, and the hidden size {hidden} is not a multiple "
            f"of the {heads} attention heads; expected one of the two. Correct the checkpoint's "
            "configuration."
        )
    return hidden // heads


def spec_from_hf(config: Mapping[str, Any], origin: str = "config.json") -> ModelSpec:
    """Read a Hugging Face `config.json`. Errors name the file as `origin`.

    Raises MistralcError naming the first setting that is missing, of the wrong type, or not part
    of the dense Mistral architecture.
    """
    fields = Fields(config, origin)
    family = _family(fields)
    _check_supported(fields)
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    layers = layer_count(fields, "num_hidden_layers")
    theta, scaling = _rope_from_hf(fields)
    return ModelSpec(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=_kv_heads(fields, heads, family),
        head_dim=head_size(fields, "head_dim", hidden, heads),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
        layer_windows=_windows_from_hf(fields, layers, family),
    )


def _family(fields: Fields) -> str:
    """Return `mistral`, `ministral` or `llama`, if `architectures` and `model_type` agree."""
    names = fields.values.get("architectures") or []
    expected = f"one of {', '.join(_FAMILIES)}"
    if not isinstance(names, list) or len(names) > 1:
        raise fields.invalid("architectures", f"a list with {expected}")
    if names and (not isinstance(names[0], str) or names[0] not in _FAMILIES):
        raise MistralcError(
            f"{fields.origin}: the architecture is {names[0]}; expected {expected}. {USE_ANOTHER}"
        )
    model_type = fields.text("model_type", _FAMILIES[names[0]] if names else None)
    family = _FAMILIES[names[0]] if names else model_type
    if family not in _FAMILIES.values() or model_type != family:
        raise MistralcError(
            f"{fields.origin}: `model_type` is {model_type}; expected "
            f"{family if names else 'mistral, ministral or llama'}"
            f"{', because the architecture is ' + names[0] if names else ''}. {USE_ANOTHER}"
        )
    # transformers' AutoConfig reads a Mistral with `layer_types` as a Ministral.
    return "ministral" if family == "mistral" and fields.has("layer_types") else family


def _check_supported(fields: Fields) -> None:
    """Raise for settings that change what the decoder computes or how weights are stored."""
    _refuse(fields, _BIASES, "biases")
    _refuse(fields, _EXPERTS, "a mixture of experts")
    _refuse(fields, _QK_NORMS, "normalized queries and keys")
    _refuse(fields, ("text_config", "vision_config"), "several models in one")
    if fields.text("hidden_act", "silu") not in ("silu", "swish"):
        raise MistralcError(
            f"{fields.origin}: `hidden_act` is {fields.text('hidden_act')}; expected the "
            f"activation silu. {USE_ANOTHER}"
        )
    _refuse_partial_rotary(fields)


def _refuse(fields: Fields, keys: tuple[str, ...], meaning: str) -> None:
    for key in keys:
        value = fields.values.get(key)
        if value is not None and value is not False and value != 0:
            raise MistralcError(
                f"{fields.origin}: `{key}` asks for {meaning}, which this decoder does not have; "
                f"expected no such setting, false or 0. {USE_ANOTHER}"
            )


def _refuse_partial_rotary(fields: Fields) -> None:
    if fields.number("partial_rotary_factor", 1.0) != 1.0:
        raise MistralcError(
            f"{fields.origin}: `partial_rotary_factor` is "
            f"{fields.number('partial_rotary_factor')}; expected 1, rotary embedding of the whole "
            f"head. {USE_ANOTHER}"
        )


def _kv_heads(fields: Fields, heads: int, family: str) -> int:
    # An absent key means as many as heads to Llama and 8 to Mistral, so Mistral has to give it.
    # Null means as many as heads to both.
    if family == "llama" or "num_key_value_heads" in fields.values:
        return fields.integer("num_key_value_heads", heads)
    return fields.integer("num_key_value_heads")


def _windows_from_hf(fields: Fields, layers: int, family: str) -> tuple[Window, ...]:
    """Return `sliding_window` for each layer that `layer_types` makes slide; without it, all do."""
    window = fields.integer("sliding_window") if fields.has("sliding_window") else None
    if family == "llama":
        if window is not None:
            raise MistralcError(
                f"{fields.origin}: `sliding_window` is {window}, which LlamaForCausalLM ignores; "
                "expected null. Set the architecture to MistralForCausalLM if the model was "
                "trained with the window; otherwise remove the setting, and use --window."
            )
    elif "sliding_window" not in fields.values:
        window = _DEFAULT_WINDOW
    kinds = fields.values.get("layer_types")
    if kinds is None:
        return (window,) * layers
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise fields.invalid("layer_types", f"a list with one entry for each of {layers} layers")
    return tuple(_window_of(fields, kind, window) for kind in kinds)


def _window_of(fields: Fields, kind: Any, window: Window) -> Window:
    if kind == "full_attention":
        return None
    if kind != "sliding_attention":
        raise MistralcError(
            f"{fields.origin}: `layer_types` has {str(kind)[:40]}; expected full_attention or "
            f"sliding_attention. {USE_ANOTHER}"
        )
    if window is None:
        raise MistralcError(
            f"{fields.origin}: `layer_types` has sliding_attention, but `sliding_window` is null; "
            "expected the number of tokens that such a layer sees. Correct one of the two."
        )
    return window


def _rope_from_hf(fields: Fields) -> tuple[float, RopeScaling | None]:
    """Read theta and scaling: `rope_parameters` (5), or `rope_theta` and `rope_scaling` (4).

    A file may have both spellings if they agree.
    """
    sections = [
        section
        for key in ("rope_parameters", "rope_scaling")
        if (section := fields.section(key)) is not None
    ]
    thetas = {part.number("rope_theta") for part in (fields, *sections) if part.has("rope_theta")}
    scalings = {_scaling_from_hf(section) for section in sections}
    if len(thetas) > 1 or len(scalings) > 1:
        raise MistralcError(
            f"{fields.origin}: `rope_theta`, `rope_parameters` and `rope_scaling` contradict each "
            "other; expected the same rotary embedding in all of them. Keep the one that the model "
            "was trained with."
        )
    return next(iter(thetas), DEFAULT_THETA), next(iter(scalings), None)


_ROPE_KEYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_SCALING_KEYS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
}


def _scaling_from_hf(section: Fields) -> RopeScaling | None:
    types = {section.text(key) for key in ("rope_type", "type") if section.has(key)} or {"default"}
    name = "/".join(sorted(types))
    if name not in _SCALING_KEYS:
        raise MistralcError(
            f"{section.origin}: the rotary scaling is {name[:40]}; expected one of "
            f"{', '.join(_SCALING_KEYS)}. {USE_ANOTHER}"
        )
    section.reject_others(
        _ROPE_KEYS | _SCALING_KEYS[name], f"The rotary scaling is {name}. {USE_ANOTHER}"
    )
    _refuse_partial_rotary(section)
    if name == "default":
        return None
    factor = section.number("factor")
    if name == "linear":
        return RopeScaling(rope_type="linear", factor=factor)
    scaling = RopeScaling(
        rope_type="llama3",
        factor=factor,
        low_freq_factor=section.number("low_freq_factor"),
        high_freq_factor=section.number("high_freq_factor"),
        original_max_position_embeddings=section.integer("original_max_position_embeddings"),
    )
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise section.invalid("high_freq_factor", f"more than low_freq_factor, "
                              f"{scaling.low_freq_factor}")  # fmt: skip
    return scaling
