"""Read Mistral's `params.json` into a ModelSpec. Knows nothing about weights or torch.

Every key means what it means to Mistral's reference code (mistral-inference, `args.py`,
`transformer.py` and `cache.py`). A key that has a value and is not listed here is an error: newer
files have settings that change the arithmetic, and ignoring one would silently give other logits.
"""

from collections.abc import Mapping
from typing import Any

from exporter.families.config import USE_ANOTHER, Window, head_size, layer_count
from exporter.families.rotary import yarn_factor
from exporter.fields import Fields
from graphs.errors import MistralcError
from graphs.rope import EVERYWHERE, Rope, RopeScaling
from graphs.spec import ModelSpec

LEFT_OUT = ("vision_encoder",)
"""Settings of models for other input than text, whose weights are left out."""

_CONTEXT = 128_000  # positions in the rotary table of the reference code
_READ = frozenset(
    {"dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps",
     "vocab_size", "rope_theta", "sliding_window", "_sliding_window", "tied_embeddings",
     "max_position_embeddings", "max_seq_len", "model_type", "activation", "yarn",
     "llama_4_scaling", *LEFT_OUT}
)  # fmt: skip
_WITHOUT_EFFECT = frozenset({"max_batch_size", "quantization"})  # the latter: `quantized/`
_YARN = frozenset({"factor", "original_max_position_embeddings", "beta", "alpha", "apply_scale"})
_LLAMA_4 = frozenset({"original_max_position_embeddings", "beta"})
_REFUSED: Mapping[str, str] = {
    "moe": "a mixture of experts",
    "lora": "LoRA layers",
    "audio": "an audio encoder",
    "multimodal": "an audio or vision encoder",
    "rope_scaling": "rotary scaling",
    "qk_norm": "normalized queries and keys",
    "use_biases": "biases",
}


def spec_from_params(params: Mapping[str, Any], origin: str = "params.json") -> ModelSpec:
    """Read Mistral's `params.json`. Errors name the file as `origin`.

    Raises MistralcError naming the first setting that is missing, of the wrong type, or not one
    that the decoder computes.
    """
    fields = Fields(params, origin)
    _check_supported(fields)
    dim, heads = fields.integer("dim"), fields.integer("n_heads")
    layers = layer_count(fields, "n_layers")
    windows = _windows(fields, layers)
    return ModelSpec(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=dim,
        intermediate_size=fields.integer("hidden_dim"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=fields.integer("n_kv_heads"),
        head_dim=head_size(fields, "head_dim", dim, heads),
        max_position_embeddings=_context(fields),
        rms_norm_eps=fields.number("norm_eps"),
        rope_theta=_theta(fields),
        rope_scaling=_yarn(fields),
        tie_word_embeddings=fields.flag("tied_embeddings", default=False),
        layer_windows=windows,
        rope=_query_scale(fields),
    )


def _check_supported(fields: Fields) -> None:
    for key, meaning in _REFUSED.items():
        if fields.values.get(key):
            raise MistralcError(
                f"{fields.origin}: `{key}` asks for {meaning}, which this decoder does not have; "
                f"expected no such setting. {USE_ANOTHER}"
            )
    fields.reject_others(
        _READ | _WITHOUT_EFFECT | _REFUSED.keys(), "Remove it if it has no effect."
    )
    for key, expected in (("model_type", "transformer"), ("activation", "silu")):
        if fields.text(key, expected) != expected:
            raise MistralcError(
                f"{fields.origin}: `{key}` is {fields.text(key)}; expected {expected}. "
                f"{USE_ANOTHER}"
            )


def _context(fields: Fields) -> int:
    return fields.integer("max_position_embeddings", fields.integer("max_seq_len", _CONTEXT))


def _theta(fields: Fields) -> float:
    # The reference code falls back to 10**6. Its first version to do so kept 10**4 for a model
    # with a window, and the only weights published with a window and without a theta,
    # Mistral-7B v0.1, were trained with 10**4.
    windowed = fields.has("sliding_window") or fields.has("_sliding_window")
    return fields.number("rope_theta", 10_000.0 if windowed else 1_000_000.0)


def _yarn(fields: Fields) -> RopeScaling | None:
    """Read YaRN; `alpha` and `beta` are the numbers of turns that it blends between."""
    section = fields.section("yarn")
    if section is None:
        return None
    section.reject_others(_YARN, "Use the file that was published with these weights.")
    factor = section.number("factor")
    scaled = section.flag("apply_scale", default=True)
    return RopeScaling(
        rope_type="yarn",
        factor=factor,
        original_max_position_embeddings=section.integer("original_max_position_embeddings"),
        beta_fast=section.number("beta"),
        beta_slow=section.number("alpha"),
        attention_factor=yarn_factor(factor) if scaled else 1.0,
    )


def _query_scale(fields: Fields) -> Rope:
    section = fields.section("llama_4_scaling")
    if section is None:
        return EVERYWHERE
    section.reject_others(_LLAMA_4, "Use the file that was published with these weights.")
    return Rope(
        query_scale=section.number("beta"),
        query_scale_length=section.integer("original_max_position_embeddings"),
    )


def _windows(fields: Fields, layers: int) -> tuple[Window, ...]:
    """Read one window for all layers, or a list that repeats over them; null: full attention."""
    if fields.has("sliding_window") and fields.has("_sliding_window"):
        raise MistralcError(
            f"{fields.origin}: both `sliding_window` and `_sliding_window` are given; expected one "
            "of the two. Keep the one that the model was trained with."
        )
    key = "sliding_window" if fields.has("sliding_window") else "_sliding_window"
    value = fields.values.get(key)
    if not isinstance(value, list):
        return ((fields.integer(key) if fields.has(key) else None),) * layers
    expected = f"a number of tokens, or a list of them whose length divides the {layers} layers"
    if not value or layers % len(value):
        raise fields.invalid(key, expected)
    if not all(size is None or (type(size) is int and size >= 1) for size in value):
        raise fields.invalid(key, expected)
    return tuple(value) * (layers // len(value))
