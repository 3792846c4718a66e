"""Gemma 2: soft caps, a window in every other layer, four norms, GeGLU, a scaled embedding.

transformers: models/gemma2. Its norms store the gain minus 1, except in GGUF.
"""

import math
from dataclasses import replace

from exporter.families.config import read_common, read_layers, window_of, windows_of
from exporter.families.family import Family, Format, StoredAs
from exporter.families.names import named_half_split
from exporter.fields import Fields
from graphs.errors import MistralcError
from graphs.spec import AttentionSpec, ModelSpec, Multipliers

_WINDOW, _KV_HEADS, _HEAD_DIM = 4096, 4, 256  # of Gemma2Config
_SCORES, _LOGITS, _QUERY = 50.0, 30.0, 256.0
_LAYERS_27B = 46


def read_config(fields: Fields) -> ModelSpec:
    """Read a `config.json`."""
    if fields.flag("use_bidirectional_attention", default=False):
        raise MistralcError(
            f"{fields.origin}: `use_bidirectional_attention` is true; expected a causal decoder. "
            "The README lists the models that are supported: use another checkpoint."
        )
    bias = fields.flag("attention_bias", default=False)
    whole = Fields({"head_dim": _HEAD_DIM, **fields.values}, fields.origin)
    return read_common(
        whole,
        windows_of(fields, window_of(fields, _WINDOW), range(0, read_layers(fields), 2)),
        reads=("attention_bias",),
        tied=True,
        kv_heads=_KV_HEADS,
        act="hidden_activation",
        attention=AttentionSpec(
            bias=bias,
            output_bias=bias,
            scale=fields.number("query_pre_attn_scalar", _QUERY) ** -0.5,
            softcap=_cap(fields, "attn_logit_softcapping", _SCORES),
        ),
        multipliers=Multipliers(embedding=math.sqrt(fields.integer("hidden_size"))),
        post_norms=True,
        logit_softcap=_cap(fields, "final_logit_softcapping", _LOGITS),
    )


def tensors(spec: ModelSpec, kind: Format, name: str) -> StoredAs:
    """Return where a weight is stored; Hugging Face's norms hold the gain minus 1."""
    stored = named_half_split(spec, kind, name)
    return replace(stored, add_one=kind == "huggingface" and name.endswith("norm.weight"))


def read_gguf(fields: Fields, spec: ModelSpec) -> ModelSpec:
    """Add everything that differs from Llama, with llama.cpp's defaults.

    llama.cpp tells the 27B by its number of layers: its scores are scaled by hidden size / heads.
    """
    size = spec.hidden_size // spec.num_attention_heads
    size = size if spec.num_hidden_layers == _LAYERS_27B else spec.head_dim
    window = spec.layer_windows[0] or _WINDOW
    layers = range(spec.num_hidden_layers)
    return replace(
        spec,
        layer_windows=tuple(window if i % 2 == 0 else None for i in layers),
        attention=AttentionSpec(
            scale=size**-0.5, softcap=fields.decimal("gemma2.attn_logit_softcapping", _SCORES)
        ),
        multipliers=Multipliers(embedding=math.sqrt(spec.hidden_size)),
        post_norms=True,
        activation="gelu_tanh",
        logit_softcap=fields.decimal("gemma2.final_logit_softcapping", _LOGITS),
    )


def _cap(fields: Fields, key: str, default: float) -> float | None:
    """Read a cap; null means none, and absent means the default."""
    if key in fields.values and fields.values[key] is None:
        return None
    return fields.number(key, default)


GEMMA2 = Family(
    name="gemma2",
    title="Gemma 2",
    adds="soft caps of scores and logits; a window in every other layer; four norms; GeGLU; a "
    "scaled embedding",
    architectures=("Gemma2ForCausalLM",),
    read_config=read_config,
    tensors=tensors,
    gguf_names=("gemma2",),
    gguf_keys=frozenset({"attn_logit_softcapping", "final_logit_softcapping"}),
    read_gguf=read_gguf,
    needs=("caps_scores",),
)
