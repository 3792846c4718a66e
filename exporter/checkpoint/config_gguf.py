"""Read GGUF metadata into a ModelSpec. Knows nothing about the file format, weights or torch.

The architecture chooses the family (`exporter/families/`); `llama` is also that of Mistral.
Meanings and defaults are those of the GGUF specification and of llama.cpp's loader. A key of the
architecture that is not listed here, nor among those of its family, is an error unless it has a
value that changes nothing: such a key exists to change the arithmetic.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from exporter.families.catalogue import BY_GGUF_NAME
from exporter.families.config import USE_ANOTHER, head_size, layer_count
from exporter.families.family import Family
from exporter.families.rotary import DEFAULT_THETA, longrope_factor, yarn_factor
from exporter.fields import Fields
from graphs.errors import MistralcError
from graphs.rope import EVERYWHERE, Rope, RopeScaling
from graphs.spec import ModelSpec

Numbers = Mapping[str, tuple[float, ...]]
"""The rotary factors that a file stores as tensors, by the tensor's name."""

FACTORS, LONG_FACTORS, SHORT_FACTORS = (
    "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight",
)  # fmt: skip
_NO_NUMBERS: Numbers = {}
_TOKENS = "tokenizer.ggml.tokens"
_READ = frozenset(
    (
        "vocab_size", "block_count", "embedding_length", "feed_forward_length", "context_length",
        "attention.head_count", "attention.head_count_kv", "attention.key_length",
        "attention.value_length", "attention.sliding_window", "attention.causal",
        "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base",
        "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
        "rope.scaling.original_context_length", "rope.scaling.attn_factor",
        "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
        "rope.scaling.yarn_log_multiplier", "expert_count", "expert_used_count",
    )
)  # fmt: skip
_WITHOUT_EFFECT = frozenset(
    # llama.cpp computes the factor of YaRN itself, whatever `yarn_attn_factor` is.
    {"tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.yarn_attn_factor"}
)
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "logit_scale": (0, 1), "embedding_scale": (0, 1), "residual_scale": (0, 1),
    "attention.scale": (0,), "attention.max_alibi_bias": (0,), "attention.clamp_kqv": (0,),
    "attention.temperature_scale": (0,), "attention.shared_kv_layers": (0,),
    "attn_logit_softcapping": (0,), "final_logit_softcapping": (0,), "pooling_type": (0,),
    "rope.scaling.yarn_ext_factor": (-1, 1), "expert_shared_count": (0,),
    "expert_weights_scale": (0, 1), "leading_dense_block_count": (0,), "nextn_predict_layers": (0,),
    "swin_norm": (False,),
}  # fmt: skip
"""Values of keys of other architectures that change nothing here; converters write them too."""


def spec_from_gguf(
    metadata: Mapping[str, Any],
    *,
    tied: bool,
    origin: str = "the GGUF metadata",
    numbers: Numbers = _NO_NUMBERS,
    tensors: Collection[str] = (),
) -> ModelSpec:
    """Read GGUF metadata, plain Python values by key. Errors name the file as `origin`.

    GGUF has no keys that say whether the embedding is `tied`, that is, whether the file lacks
    `output.weight`, nor which linears have biases: that follows from the names `tensors`. Raises
    MistralcError naming the first setting that is missing, of the wrong type, or not one that the
    decoder computes.
    """
    fields = Fields(metadata, origin)
    family = gguf_family(fields)
    own = _Architecture(fields, fields.text("general.architecture"))
    _check_supported(own, family)
    hidden = own.integer("embedding_length")
    heads = own.same_in_all_layers("attention.head_count")
    layers = layer_count(fields, own.key("block_count"))
    window = own.fields.values.get(own.key("attention.sliding_window")) or None  # 0 means none
    if window is not None:
        window = own.integer("attention.sliding_window")
    head_dim = _head_dim(own, hidden, heads)
    spec = ModelSpec(
        vocab_size=_vocab_size(own),
        hidden_size=hidden,
        intermediate_size=own.same_in_all_layers("feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=own.same_in_all_layers("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=own.integer("context_length"),
        rms_norm_eps=own.decimal("attention.layer_norm_rms_epsilon"),
        rope_theta=own.decimal("rope.freq_base", DEFAULT_THETA),
        rope_scaling=_scaling(own, numbers),
        tie_word_embeddings=tied,
        layer_windows=(window,) * layers,
        rope=_rope(own, family, head_dim),
    )
    return _with_biases(
        spec if family.read_gguf is None else family.read_gguf(fields, spec), tensors
    )


def gguf_family(fields: Fields) -> Family:
    """Return the family of an architecture. Raises MistralcError that lists those there are."""
    architecture = fields.text("general.architecture")
    if architecture not in BY_GGUF_NAME:
        raise MistralcError(
            f"{fields.origin}: the architecture is {architecture[:40]}; expected one of "
            f"{', '.join(BY_GGUF_NAME)} (Mistral's is llama). {USE_ANOTHER}"
        )
    return BY_GGUF_NAME[architecture]


@dataclass(frozen=True, slots=True)
class _Architecture:
    """The keys of one architecture, without its name in front of them."""

    fields: Fields
    name: str

    def key(self, name: str) -> str:
        return f"{self.name}.{name}"

    def has(self, name: str) -> bool:
        return self.fields.has(self.key(name))

    def integer(self, name: str, default: int | None = None) -> int:
        return self.fields.integer(self.key(name), default)

    def decimal(self, name: str, default: float | None = None) -> float:
        return self.fields.decimal(self.key(name), default)

    def same_in_all_layers(self, name: str, default: int | None = None) -> int:
        """Read a number that GGUF may also give per layer, as a list of equal entries."""
        key = self.key(name)
        value = self.fields.values.get(key)
        if not isinstance(value, list):
            return self.fields.integer(key, default)
        if len(set(map(str, value))) != 1:
            raise self.fields.invalid(key, "one number for all layers")
        return Fields({key: value[0]}, self.fields.origin).integer(key)


def _check_supported(own: _Architecture, family: Family) -> None:
    fields = own.fields
    if fields.values.get(own.key("expert_count")):
        raise MistralcError(
            f"{fields.origin}: `{own.key('expert_count')}` asks for a mixture of experts; expected "
            f"0. {USE_ANOTHER}"
        )
    if not fields.flag(own.key("attention.causal"), default=True):
        raise MistralcError(
            f"{fields.origin}: `{own.key('attention.causal')}` is false; expected a causal "
            f"decoder. {USE_ANOTHER}"
        )
    prefix = own.key("")
    others = {
        key: value
        for key, value in fields.values.items()
        if key.startswith(prefix) and not _is_neutral(key.removeprefix(prefix), value)
    }
    allowed = _READ | _WITHOUT_EFFECT | family.gguf_keys
    Fields(others, fields.origin).reject_others(frozenset(map(own.key, allowed)), USE_ANOTHER)


def _is_neutral(name: str, value: object) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(one in _NEUTRAL.get(name, ()) for one in values)


def _with_biases(spec: ModelSpec, tensors: Collection[str]) -> ModelSpec:
    """Add the biases that the first layer has; a file that lacks others is refused later."""
    attention = replace(
        spec.attention,
        bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
    )
    return replace(spec, attention=attention, mlp_bias="blk.0.ffn_down.bias" in tensors)


def _vocab_size(own: _Architecture) -> int:
    tokens = own.fields.values.get(_TOKENS)
    counted = len(tokens) if isinstance(tokens, Sequence) else None
    return own.integer("vocab_size", counted)


def _head_dim(own: _Architecture, hidden: int, heads: int) -> int:
    size = head_size(own.fields, own.key("attention.key_length"), hidden, heads)
    if own.integer("attention.value_length", size) != size:
        key = own.key("attention.value_length")
        raise own.fields.invalid(key, f"the length of the keys, {size}")
    return size


def _rope(own: _Architecture, family: Family, head_dim: int) -> Rope:
    count = own.integer("rope.dimension_count", head_dim)
    if count == head_dim:
        return EVERYWHERE
    if not family.rotates_parts:
        raise own.fields.invalid(
            own.key("rope.dimension_count"),
            f"the whole head, {head_dim} (no partial rotary embedding)",
        )
    return Rope(features=count)


def _scaling(own: _Architecture, numbers: Numbers) -> RopeScaling | None:
    """Read the scaling of frequencies. A factor without a type is linear; 0 and 1 mean none."""
    if numbers:
        return _factors(own, numbers)
    # `rope.scale_linear` is the older name.
    key = "rope.scaling.factor" if own.has("rope.scaling.factor") else "rope.scale_linear"
    kind = own.fields.text(own.key("rope.scaling.type"), "linear")
    if kind not in ("none", "linear", "yarn"):
        raise MistralcError(
            f"{own.fields.origin}: `{own.key('rope.scaling.type')}` is {kind[:40]}; expected none, "
            f"linear or yarn. {USE_ANOTHER}"
        )
    attention = own.decimal("rope.scaling.attn_factor", 1.0)
    if kind != "yarn" and attention != 1:
        raise own.fields.invalid(own.key("rope.scaling.attn_factor"), "1, or rotary factors")
    if kind == "none" or own.fields.values.get(own.key(key)) in (None, 0, 1):
        return None
    factor = own.decimal(key)
    if kind == "linear":
        return RopeScaling(rope_type="linear", factor=factor)
    return _yarn(own, factor, attention)


def _yarn(own: _Architecture, factor: float, attention: float) -> RopeScaling:
    """Read YaRN; what cosines and sines are multiplied by follows as in llama.cpp's context."""
    logarithm = "rope.scaling.yarn_log_multiplier"
    scale = yarn_factor(factor)
    if own.fields.values.get(own.key(logarithm)):
        scale /= yarn_factor(factor, own.decimal(logarithm))
    return RopeScaling(
        rope_type="yarn",
        factor=factor,
        original_max_position_embeddings=_original(own),
        beta_fast=own.decimal("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=own.decimal("rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=attention * scale,
    )


def _factors(own: _Architecture, numbers: Numbers) -> RopeScaling | None:
    """Read divisors of each frequency: those of Llama 3, or Phi-3's for short and long texts."""
    original = _original(own)
    factor = own.integer("context_length") / original
    long = SHORT_FACTORS in numbers
    needed = (SHORT_FACTORS, LONG_FACTORS) if long else (FACTORS,)
    if missing := [name for name in needed if name not in numbers]:
        raise MistralcError(
            f"{own.fields.origin} lacks the tensor {missing[0]} beside {', '.join(numbers)}; "
            "expected the rotary factors of short and of long texts. Download the file again."
        )
    if not long and set(numbers[FACTORS]) == {1.0}:
        return None
    computed = longrope_factor(factor, original) if long else 1.0
    return RopeScaling(
        rope_type="longrope",
        factor=max(factor, 1.0),
        original_max_position_embeddings=original,
        attention_factor=own.decimal("rope.scaling.attn_factor", computed),
        short_factor=numbers[needed[0]],
        long_factor=numbers[LONG_FACTORS] if long else (),
    )


def _original(own: _Architecture) -> int:
    return own.integer("rope.scaling.original_context_length", own.integer("context_length"))
