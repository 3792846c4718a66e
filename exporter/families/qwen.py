"""Qwen2 and Qwen2.5: biases of queries, keys and values. Qwen3: norms of queries and keys.

The upper layers of both may have a window. transformers: models/qwen2 and models/qwen3.
"""

from dataclasses import replace

from exporter.families.config import Window, read_common, read_layers, window_of, windows_of
from exporter.families.family import Family
from exporter.families.names import named_half_split
from exporter.fields import Fields
from graphs.spec import AttentionSpec, ModelSpec

_WINDOW, _MAX_WINDOW_LAYERS = 4096, 28  # of Qwen2Config and Qwen3Config
_KV_HEADS = 32
_HEAD_DIM = 128  # of Qwen3Config


def read_qwen2(fields: Fields) -> ModelSpec:
    """Read a `config.json`."""
    return read_common(
        fields, upper_windows(fields), kv_heads=_KV_HEADS, attention=AttentionSpec(bias=True)
    )


def upper_windows(fields: Fields) -> tuple[Window, ...]:
    """Return the window of each layer: that of layers from `max_window_layers` on, if it is used.

    Without `use_sliding_window` there is none.
    """
    if not fields.flag("use_sliding_window", default=False):
        return windows_of(fields, None)
    first = fields.values.get("max_window_layers", _MAX_WINDOW_LAYERS)
    if type(first) is not int or first < 0:
        raise fields.invalid("max_window_layers", "a whole number of layers")
    slides = range(first, read_layers(fields))
    return windows_of(fields, window_of(fields, _WINDOW), slides)


def read_qwen3(fields: Fields) -> ModelSpec:
    """Read a `config.json`."""
    bias = fields.flag("attention_bias", default=False)
    # Unlike that of other families, an absent head size is not the hidden size / heads.
    whole = Fields({"head_dim": _HEAD_DIM, **fields.values}, fields.origin)
    return read_common(
        whole,
        upper_windows(fields),
        reads=("attention_bias",),
        kv_heads=_KV_HEADS,
        attention=AttentionSpec(bias=bias, output_bias=bias, query_key_norms=True),
    )


def add_norms(_: Fields, spec: ModelSpec) -> ModelSpec:
    """Add the norms of queries and keys."""
    return replace(spec, attention=AttentionSpec(query_key_norms=True))


QWEN2 = Family(
    name="qwen2",
    title="Qwen2, Qwen2.5",
    adds="biases of q, k and v; a window in upper layers",
    architectures=("Qwen2ForCausalLM",),
    read_config=read_qwen2,
    tensors=named_half_split,
    gguf_names=("qwen2",),
)
QWEN3 = Family(
    name="qwen3",
    title="Qwen3 (dense)",
    adds="norms of queries and keys; a window in upper layers",
    architectures=("Qwen3ForCausalLM",),
    read_config=read_qwen3,
    tensors=named_half_split,
    gguf_names=("qwen3",),
    read_gguf=add_norms,
)
