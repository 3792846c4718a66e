"""Read GGUF metadata into a ModelSpec. Knows nothing about the file format, weights or torch.

Only the architecture `llama` is read; converters use that name for Mistral too. Meanings and
defaults are those of the GGUF specification and of llama.cpp's loader. A `llama.*` key that is not
listed here is an error, because such a key exists to change the arithmetic.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from exporter.checkpoint.config_hf import DEFAULT_THETA, USE_ANOTHER, head_size, layer_count
from exporter.checkpoint.fields import Fields
from graphs.errors import MistralcError
from graphs.spec import ModelSpec, RopeScaling

_TOKENS = "tokenizer.ggml.tokens"
_READ = frozenset(
    "llama." + key
    for key in (
        "vocab_size", "block_count", "embedding_length", "feed_forward_length", "context_length",
        "attention.head_count", "attention.head_count_kv", "attention.key_length",
        "attention.value_length", "attention.sliding_window", "attention.causal",
        "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base",
        "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
        "expert_count", "expert_used_count",
    )
)  # fmt: skip
_WITHOUT_EFFECT = frozenset(
    {"llama.tensor_data_layout", "llama.rope.scaling.finetuned",
     "llama.rope.scaling.original_context_length"}
)  # fmt: skip


def spec_from_gguf(
    metadata: Mapping[str, Any], *, tied: bool, origin: str = "the GGUF metadata"
) -> ModelSpec:
    """Read GGUF metadata, plain Python values by key. Errors name the file as `origin`.

    `tied` says that the file has no `output.weight`, because GGUF has no key for that. Raises
    MistralcError naming the first setting that is missing, of the wrong type, or not part of the
    dense Mistral architecture.
    """
    fields = Fields(metadata, origin)
    _check_supported(fields)
    hidden = fields.integer("llama.embedding_length")
    heads = _same_in_all_layers(fields, "llama.attention.head_count")
    layers = layer_count(fields, "llama.block_count")
    window = fields.values.get("llama.attention.sliding_window") or None  # 0 means none
    if window is not None:
        window = fields.integer("llama.attention.sliding_window")
    return ModelSpec(
        vocab_size=_vocab_size(fields),
        hidden_size=hidden,
        intermediate_size=_same_in_all_layers(fields, "llama.feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=_same_in_all_layers(fields, "llama.attention.head_count_kv", heads),
        head_dim=_head_dim(fields, hidden, heads),
        max_position_embeddings=fields.integer("llama.context_length"),
        rms_norm_eps=_decimal(fields.number("llama.attention.layer_norm_rms_epsilon")),
        rope_theta=_decimal(fields.number("llama.rope.freq_base", DEFAULT_THETA)),
        rope_scaling=_scaling(fields),
        tie_word_embeddings=tied,
        layer_windows=(window,) * layers,
    )


def _check_supported(fields: Fields) -> None:
    architecture = fields.text("general.architecture")
    if architecture != "llama":
        raise MistralcError(
            f"{fields.origin}: the architecture is {architecture[:40]}; expected llama, the name "
            f"of Mistral models in GGUF. {USE_ANOTHER}"
        )
    if fields.values.get("llama.expert_count"):
        raise MistralcError(
            f"{fields.origin}: `llama.expert_count` asks for a mixture of experts; expected 0. "
            f"{USE_ANOTHER}"
        )
    if not fields.flag("llama.attention.causal", default=True):
        raise MistralcError(
            f"{fields.origin}: `llama.attention.causal` is false; expected a causal decoder. "
            f"{USE_ANOTHER}"
        )
    own = {key: value for key, value in fields.values.items() if key.startswith("llama.")}
    Fields(own, fields.origin).reject_others(_READ | _WITHOUT_EFFECT, USE_ANOTHER)


def _vocab_size(fields: Fields) -> int:
    tokens = fields.values.get(_TOKENS)
    counted = len(tokens) if isinstance(tokens, Sequence) else None
    return fields.integer("llama.vocab_size", counted)


def _same_in_all_layers(fields: Fields, key: str, default: int | None = None) -> int:
    """Read a number that GGUF may also give per layer, as a list of equal entries."""
    value = fields.values.get(key)
    if not isinstance(value, list):
        return fields.integer(key, default)
    if len(set(map(str, value))) != 1:
        raise fields.invalid(key, "one number for all layers")
    return Fields({key: value[0]}, fields.origin).integer(key)


def _head_dim(fields: Fields, hidden: int, heads: int) -> int:
    size = head_size(fields, "llama.attention.key_length", hidden, heads)
    if fields.integer("llama.attention.value_length", size) != size:
        raise fields.invalid("llama.attention.value_length", f"the length of the keys, {size}")
    if fields.integer("llama.rope.dimension_count", size) != size:
        raise fields.invalid(
            "llama.rope.dimension_count", f"the whole head, {size} (no partial rotary embedding)"
        )
    return size


def _scaling(fields: Fields) -> RopeScaling | None:
    # `rope.scale_linear` is the older name. A factor without a type is linear; 0 and 1 mean none.
    key = "llama.rope.scaling.factor"
    if not fields.has(key):
        key = "llama.rope.scale_linear"
    kind = fields.text("llama.rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise MistralcError(
            f"{fields.origin}: `llama.rope.scaling.type` is {kind[:40]}; expected none or "
            f"linear. {USE_ANOTHER}"
        )
    if kind == "none" or fields.values.get(key) in (None, 0, 1):
        return None
    return RopeScaling(rope_type="linear", factor=fields.number(key))


def _decimal(value: float) -> float:
    """Return the shortest decimal of a float32: GGUF stores 1e-5 as 9.999999747378752e-06."""
    return float(str(np.float32(value))) if float(np.float32(value)) == value else value
