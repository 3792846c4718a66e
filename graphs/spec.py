"""The shape of a model and of its KV ring. Standard library only.

Dimension letters, here and everywhere: B batch, S tokens in this step, T positions asked for
logits, C ring capacity, W window, H query heads, K key/value heads, D head size, E hidden,
F feed-forward, V vocabulary, L layers.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from graphs import window
from graphs.errors import MistralcError


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How a checkpoint scales its rotary frequencies. Fields are those of `config.json`.

    `linear` divides every frequency by `factor` (Chen et al. 2023, arXiv:2306.15595); `llama3`
    divides the long wavelengths only and blends in between (Llama 3.1 model card).
    """

    rope_type: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.rope_type not in ("linear", "llama3"):
            raise MistralcError(
                f"The rotary scaling is {self.rope_type!r:.40}; expected linear or llama3. "
                "Check the checkpoint's configuration file."
            )
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            _check_number(f"rotary scaling's {name}", getattr(self, name))
        _check_count(
            "rotary scaling's original_max_position_embeddings",
            self.original_max_position_embeddings,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The shape of a Mistral-architecture decoder. Field names are those of `config.json`.

    `layer_windows[i]` is how many keys layer i sees, including its own position; None means all.
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

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                 "num_attention_heads", "num_key_value_heads", "head_dim",
                 "max_position_embeddings")  # fmt: skip
        for name in sizes:
            _check_count(f"model's {name}", getattr(self, name))
        for name in ("rms_norm_eps", "rope_theta"):
            _check_number(f"model's {name}", getattr(self, name))
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
            if size is not None and not _is_count(size):
                raise MistralcError(
                    f"A layer's sliding window is {size!r:.40}; expected at least 1 token, "
                    "or null for full attention."
                )

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

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight by its Hugging Face name; linears are [out, in].

        A checkpoint must have exactly these tensors. A tied `lm_head.weight` is not listed,
        because it is `model.embed_tokens.weight`.
        """
        e, f = self.hidden_size, self.intermediate_size
        q = self.num_attention_heads * self.head_dim
        kv = self.num_key_value_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, e)}
        for i in range(self.num_hidden_layers):
            layer = f"model.layers.{i}."
            shapes[layer + "input_layernorm.weight"] = (e,)
            shapes[layer + "self_attn.q_proj.weight"] = (q, e)
            shapes[layer + "self_attn.k_proj.weight"] = (kv, e)
            shapes[layer + "self_attn.v_proj.weight"] = (kv, e)
            shapes[layer + "self_attn.o_proj.weight"] = (e, q)
            shapes[layer + "post_attention_layernorm.weight"] = (e,)
            shapes[layer + "mlp.gate_proj.weight"] = (f, e)
            shapes[layer + "mlp.up_proj.weight"] = (f, e)
            shapes[layer + "mlp.down_proj.weight"] = (e, f)
        shapes["model.norm.weight"] = (e,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, e)
        return shapes

    def to_json(self) -> dict[str, Any]:
        """Plain data for the manifest; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote. Raises MistralcError if a field is missing or unknown."""
        try:
            fields = dict(data)
            if fields["rope_scaling"] is not None:
                fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
            fields["layer_windows"] = tuple(fields["layer_windows"])
            return cls(**fields)
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
            _check_count(f"ring's {name}", getattr(self, name))

    def capacity(self, window_size: int | None) -> int:
        """C for layers with this window: the ring's slots, a multiple of `chunk`."""
        if window_size is None:
            return -(-self.context // self.chunk) * self.chunk
        return window.capacity(window_size, self.chunk)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**63


def _check_count(what: str, value: object) -> None:
    if not _is_count(value):
        raise MistralcError(
            f"The {what} is {value!r:.40}; expected a whole number of at least 1. Check the "
            "checkpoint's configuration, or export the bundle again."
        )


def _check_number(what: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise MistralcError(
            f"The {what} is {value!r:.40}; expected a number above 0. Check the checkpoint's "
            "configuration, or export the bundle again."
        )


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
