"""The shape of a model and of its KV ring. Standard library only.

Dimension letters, here and everywhere: B batch, S tokens in this step, T positions asked for
logits, C ring capacity, W window, H query heads, K key/value heads, D head size, E hidden,
F feed-forward, V vocabulary, L layers.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, Self, get_args

from graphs import window
from graphs.errors import MistralcError
from graphs.rope import (
    EVERYWHERE,
    Rope,
    RopeScaling,
    check_count,
    check_flag,
    check_number,
    is_count,
)

Activation = Literal["silu", "gelu_tanh"]

_ALWAYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta",
    "rope_scaling", "tie_word_embeddings", "layer_windows",
)  # fmt: skip
_ALWAYS_OF_SCALING = (
    "rope_type", "factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings",
)  # fmt: skip
"""The fields of the first bundles, whose descriptions are read and hashed as they were written."""


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""Names of the embedding [V, E], and of the output layer [V, E] where it is not tied to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """What differs in attention between families. The defaults are Mistral's.

    `bias` is that of q_proj, k_proj and v_proj, `output_bias` that of o_proj. `scale` multiplies
    the scores, 1 / sqrt(D) if it is None. `softcap` c replaces a score s by c tanh(s / c). With
    `query_key_norms`, every head of queries and keys is normalized before it is rotated.
    """

    bias: bool = False
    output_bias: bool = False
    scale: float | None = None
    softcap: float | None = None
    query_key_norms: bool = False

    def __post_init__(self) -> None:
        for name in ("bias", "output_bias", "query_key_norms"):
            check_flag(f"attention's {name}", getattr(self, name))
        for name in ("scale", "softcap"):
            if getattr(self, name) is not None:
                check_number(f"attention's {name}", getattr(self, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Multipliers:
    """Constants that Granite and Gemma multiply the embedding, each branch and the logits by."""

    embedding: float = 1.0
    residual: float = 1.0
    logits: float = 1.0

    def __post_init__(self) -> None:
        for name in ("embedding", "residual", "logits"):
            check_number(f"{name} multiplier", getattr(self, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The shape of a decoder. Field names are those of `config.json`; the defaults are Mistral's.

    `layer_windows[i]` is how many keys layer i sees, including its own position; None means all.
    With `post_norms`, the results of attention and feed-forward are normalized before they are
    added, as in Gemma 2. `logit_softcap` c replaces a logit x by c tanh(x / c).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    layer_windows: tuple[int | None, ...]
    rope: Rope = EVERYWHERE
    attention: AttentionSpec = AttentionSpec()
    multipliers: Multipliers = Multipliers()
    post_norms: bool = False
    activation: Activation = "silu"
    mlp_bias: bool = False
    logit_softcap: float | None = None

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                 "num_attention_heads", "num_key_value_heads", "head_dim",
                 "max_position_embeddings")  # fmt: skip
        for name in sizes:
            check_count(f"model's {name}", getattr(self, name))
        for name in ("rms_norm_eps", "rope_theta"):
            check_number(f"model's {name}", getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise MistralcError(
                f"The model has {self.num_attention_heads} query heads and "
                f"{self.num_key_value_heads} key/value heads; grouped-query attention needs the "
                "second to divide the first. Check the checkpoint's configuration file."
            )
        if self.head_dim % 2:
            raise MistralcError(
                f"The model's head_dim is {self.head_dim}; rotary embedding rotates pairs and "
                "needs an even number. Check the checkpoint's configuration file."
            )
        if len(self.layer_windows) != self.num_hidden_layers:
            raise MistralcError(
                f"{len(self.layer_windows)} attention windows are given for "
                f"{self.num_hidden_layers} layers; expected one per layer."
            )
        for size in self.layer_windows:
            if size is not None and not is_count(size):
                raise MistralcError(
                    f"A layer's sliding window is {size!r:.40}; expected at least 1 token, "
                    "or null for full attention."
                )
        self._check_parts()

    def _check_parts(self) -> None:
        for name in ("post_norms", "mlp_bias"):
            check_flag(f"model's {name}", getattr(self, name))
        if self.activation not in get_args(Activation):
            raise MistralcError(
                f"The model's activation is {self.activation!r:.40}; expected one of "
                f"{', '.join(get_args(Activation))}. Check the checkpoint's configuration file."
            )
        if self.logit_softcap is not None:
            check_number("model's logit_softcap", self.logit_softcap)
        if self.rotated_features > self.head_dim:
            raise MistralcError(
                f"{self.rotated_features} features of a head are rotated, but it has "
                f"{self.head_dim}. Check the checkpoint's configuration file."
            )
        scaling = self.rope_scaling
        for factors in () if scaling is None else (scaling.short_factor, scaling.long_factor):
            if factors and len(factors) != self.rotated_features // 2:
                raise MistralcError(
                    f"The rotary scaling has {len(factors)} factors for {self.rotated_features} "
                    "rotated features; expected one for each pair. Check the checkpoint's "
                    "configuration file."
                )

    @property
    def rotated_features(self) -> int:
        """How many features of a head are rotated, in the layers that rotate."""
        return self.head_dim if self.rope.features is None else self.rope.features

    def rotates(self, layer: int) -> bool:
        """Whether a layer rotates queries and keys."""
        return layer not in self.rope.layers_without

    def only_rotates(self, layer: int) -> bool:
        """Whether a layer rotates whole heads, and does nothing else to queries and keys."""
        whole = self.rotates(layer) and self.rotated_features == self.head_dim
        return whole and not (self.attention.query_key_norms or self.rope.query_scale)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The distinct windows in order of first use; layers with equal windows share a mask."""
        return tuple(dict.fromkeys(self.layer_windows))

    @property
    def slides(self) -> bool:
        """Whether every layer has a window, so that text may be of any length."""
        return None not in self.layer_windows

    @property
    def num_parameters(self) -> int:
        """Number of weights; a tied embedding counts once."""
        return sum(_product(shape) for shape in self.weight_shapes().values())

    def within(self, context: int) -> Self:
        """Leave out windows that no text of `context` tokens reaches the end of.

        Such a layer sees all keys, so that it computes the same and needs a ring of the context
        only.
        """
        kept = (None if size is None or size >= context else size for size in self.layer_windows)
        return replace(self, layer_windows=tuple(kept))

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight by its Hugging Face name; linears are [out, in].

        A checkpoint must have exactly these tensors. A tied `lm_head.weight` is not listed,
        because it is `model.embed_tokens.weight`.
        """
        e, f, d = self.hidden_size, self.intermediate_size, self.head_dim
        q, kv = self.num_attention_heads * d, self.num_key_value_heads * d
        shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (self.vocab_size, e)}
        for i in range(self.num_hidden_layers):
            layer = f"model.layers.{i}."
            shapes[layer + "input_layernorm.weight"] = (e,)
            attention = {"q": (q, e), "k": (kv, e), "v": (kv, e)}
            shapes |= _linears(f"{layer}self_attn.", attention, bias=self.attention.bias)
            if self.attention.query_key_norms:
                shapes[layer + "self_attn.q_norm.weight"] = (d,)
                shapes[layer + "self_attn.k_norm.weight"] = (d,)
            shapes |= _linears(f"{layer}self_attn.", {"o": (e, q)}, bias=self.attention.output_bias)
            shapes[layer + "post_attention_layernorm.weight"] = (e,)
            if self.post_norms:
                shapes[layer + "pre_feedforward_layernorm.weight"] = (e,)
            shapes |= _linears(f"{layer}mlp.", {"gate": (f, e), "up": (f, e)}, bias=self.mlp_bias)
            shapes |= _linears(f"{layer}mlp.", {"down": (e, f)}, bias=self.mlp_bias)
            if self.post_norms:
                shapes[layer + "post_feedforward_layernorm.weight"] = (e,)
        shapes["model.norm.weight"] = (e,)
        if not self.tie_word_embeddings:
            shapes[HEAD] = (self.vocab_size, e)
        return shapes

    def to_json(self) -> dict[str, Any]:
        """Plain data for the manifest; `from_json` reads it back.

        What Mistral does not have is left out where it is absent, so that a Mistral's manifest and
        fingerprint are those that earlier versions wrote.
        """
        data = _stated(self, always=_ALWAYS)
        if self.rope_scaling is not None:
            data["rope_scaling"] = _stated(self.rope_scaling, always=_ALWAYS_OF_SCALING)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote. Raises MistralcError if a field is missing or unknown."""
        try:
            found = dict(data)
            if found["rope_scaling"] is not None:
                found["rope_scaling"] = RopeScaling.from_json(found["rope_scaling"])
            found["layer_windows"] = tuple(found["layer_windows"])
            if "rope" in found:
                found["rope"] = Rope.from_json(found["rope"])
            for name, kind in (("attention", AttentionSpec), ("multipliers", Multipliers)):
                if name in found:
                    found[name] = kind(**found[name])
            return cls(**found)
        except (KeyError, TypeError, ValueError) as error:
            raise MistralcError(
                f"The model description does not have the expected fields ({error!s:.200}). It was "
                "written by another version of mistralc, or edited: export the bundle again."
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class RingSpec:
    """The size of a bundle's KV ring. `chunk` is the largest number of tokens in one step.

    `context` is the longest text of a model that has a layer without a window; other models ignore
    it. `max_batch` is the largest number of rows in one session.
    """

    chunk: int
    context: int
    max_batch: int = 1

    def __post_init__(self) -> None:
        for name in ("chunk", "context", "max_batch"):
            check_count(f"ring's {name}", getattr(self, name))

    def capacity(self, window_size: int | None) -> int:
        """C for layers with this window: the ring's slots, a multiple of `chunk`."""
        if window_size is None:
            return -(-self.context // self.chunk) * self.chunk
        return window.capacity(window_size, self.chunk)


def _stated(value: "ModelSpec | RopeScaling", always: Collection[str]) -> dict[str, Any]:
    """Return a value's fields as plain data, without those at their default; `always` stay."""
    defaults = {field.name: field.default for field in fields(value)}
    return {
        name: data
        for name, data in asdict(value).items()
        if name in always or getattr(value, name) != defaults[name]
    }


def _linears(
    at: str, shapes: Mapping[str, tuple[int, int]], *, bias: bool
) -> dict[str, tuple[int, ...]]:
    """The weights of adjacent linears [out, in], then their biases [out], by canonical name."""
    weights: dict[str, tuple[int, ...]] = {
        f"{at}{name}_proj.weight": shape for name, shape in shapes.items()
    }
    biases = {f"{at}{name}_proj.bias": (shape[0],) for name, shape in shapes.items() if bias}
    return weights | biases


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
