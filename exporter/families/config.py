"""What the `config.json` of every family has in common, read once. Knows no family.

Keys and defaults are those of transformers 5; both its spellings and those of version 4 are read.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from exporter.families.rotary import Rotary, read_rotary
from exporter.fields import Fields
from graphs.errors import MistralcError
from graphs.rope import EVERYWHERE, Rope
from graphs.spec import Activation, ModelSpec

Window = int | None

MAX_LAYERS = 1000  # published decoders have fewer than 150; a damaged number must not fill memory
USE_ANOTHER = "The README lists the models that are supported: use another checkpoint."

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe")
_BIASES = ("attention_bias", "mlp_bias", "use_bias", "qkv_bias")
_QK_NORMS = ("qk_norm", "use_qk_norm")
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip


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


def read_common(
    fields: Fields,
    windows: tuple[Window, ...],
    *,
    reads: Collection[str] = (),
    tied: bool = False,
    kv_heads: int | None = None,
    act: str = "hidden_act",
    rotary: Rotary | None = None,
    rope: Rope = EVERYWHERE,
    **parts: Any,
) -> ModelSpec:
    """Read what all families have; `parts` are fields of ModelSpec that the family adds.

    `reads` are the keys about biases that it understands; any other is refused. `tied` and
    `kv_heads` are its defaults for the embedding and the number of key/value heads (None: the key
    has to be there, null or not). `act` is its key of the activation. It gives `rotary` if it has
    read that itself.
    """
    refuse(fields, [key for key in _BIASES if key not in reads], "biases")
    refuse(fields, _EXPERTS, "a mixture of experts")
    refuse(fields, _QK_NORMS, "normalized queries and keys")
    refuse(fields, ("text_config", "vision_config"), "several models in one")
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = head_size(fields, "head_dim", hidden, heads)
    rotary = rotary or read_rotary(fields)
    if rotary.share != 1:
        rope = replace(rope, features=int(head_dim * rotary.share))
    return ModelSpec(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=layer_count(fields, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=_kv_heads(fields, heads, kv_heads),
        head_dim=head_dim,
        max_position_embeddings=fields.integer("max_position_embeddings"),
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope_theta=rotary.theta,
        rope_scaling=rotary.scaling,
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=tied),
        layer_windows=windows,
        rope=rope,
        activation=_activation(fields, act),
        **parts,
    )


def read_layers(fields: Fields) -> int:
    """Read the number of layers, which windows are counted by."""
    return layer_count(fields, "num_hidden_layers")


def window_of(fields: Fields, default: Window = None) -> Window:
    """Read `sliding_window`; `default` is what its absence means, and null means no window."""
    if "sliding_window" not in fields.values:
        return default
    return fields.integer("sliding_window") if fields.has("sliding_window") else None


def windows_of(
    fields: Fields, window: Window, slides: Collection[int] | None = None
) -> tuple[Window, ...]:
    """Return the window of each layer that `layer_types` makes slide.

    Without `layer_types`, the layers `slides` do; None means all of them.
    """
    layers, kinds = read_layers(fields), fields.values.get("layer_types")
    if kinds is None:
        return tuple(window if slides is None or i in slides else None for i in range(layers))
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise fields.invalid("layer_types", f"a list with one entry for each of {layers} layers")
    return tuple(_window_of_kind(fields, kind, window) for kind in kinds)


def no_windows(fields: Fields, architecture: str) -> tuple[Window, ...]:
    """Return full attention in every layer. Raises if a window is given, which would be ignored."""
    if fields.has("sliding_window"):
        raise MistralcError(
            f"{fields.origin}: `sliding_window` is {fields.integer('sliding_window')}, which "
            f"{architecture} ignores; expected null. Set the architecture to MistralForCausalLM if "
            "the model was trained with the window; otherwise remove the setting, and use --window."
        )
    return windows_of(fields, None)


def refuse(fields: Fields, keys: Collection[str], meaning: str) -> None:
    """Raise MistralcError if one of `keys` asks for something."""
    for key in keys:
        value = fields.values.get(key)
        if value is not None and value is not False and value != 0:
            raise MistralcError(
                f"{fields.origin}: `{key}` asks for {meaning}, which this decoder does not have; "
                f"expected no such setting, false or 0. {USE_ANOTHER}"
            )


def _activation(fields: Fields, key: str) -> Activation:
    name = fields.text(key, fields.text("hidden_act", "silu"))
    if name not in _ACTIVATIONS:
        raise MistralcError(
            f"{fields.origin}: `{key}` is {name[:40]}; expected the activation "
            f"{' or '.join(_ACTIVATIONS)}. {USE_ANOTHER}"
        )
    return _ACTIVATIONS[name]


def _kv_heads(fields: Fields, heads: int, default: int | None) -> int:
    # Null means as many as query heads to every family.
    if "num_key_value_heads" in fields.values:
        return fields.integer("num_key_value_heads", heads)
    return fields.integer("num_key_value_heads", default)


def _window_of_kind(fields: Fields, kind: Any, window: Window) -> Window:
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
