"""SmolLM3: every fourth layer does not rotate queries and keys.

transformers: models/smollm3.
"""

from dataclasses import replace

from exporter.families.config import Window, read_common, read_layers, window_of, windows_of
from exporter.families.family import Family
from exporter.families.names import named
from exporter.families.rotary import read_rotary
from exporter.fields import Fields
from graphs.rope import Rope
from graphs.spec import AttentionSpec, ModelSpec

_THETA, _INTERVAL, _KV_HEADS = 2_000_000.0, 4, 4  # of SmolLM3Config


def read_config(fields: Fields) -> ModelSpec:
    """Read a `config.json`."""
    bias = fields.flag("attention_bias", default=False)
    without = _layers_without_rotation(fields)
    return read_common(
        fields,
        _windows(fields, without),
        reads=("attention_bias", "mlp_bias"),
        tied=True,
        kv_heads=_KV_HEADS,
        rotary=read_rotary(fields, _THETA),
        rope=Rope(layers_without=without),
        attention=AttentionSpec(bias=bias, output_bias=bias),
        mlp_bias=fields.flag("mlp_bias", default=False),
    )


def every(interval: int, layers: int) -> tuple[int, ...]:
    """Return the last of every `interval` layers."""
    return tuple(range(interval - 1, layers, interval))


def _layers_without_rotation(fields: Fields) -> tuple[int, ...]:
    layers = read_layers(fields)
    flags = fields.values.get("no_rope_layers")  # 1 where a layer rotates
    if flags is None:
        return every(fields.integer("no_rope_layer_interval", _INTERVAL), layers)
    if (
        not isinstance(flags, list)
        or len(flags) < layers
        or any(one not in (0, 1) for one in flags)
    ):
        raise fields.invalid("no_rope_layers", f"a list of 0 or 1 for each of {layers} layers")
    return tuple(i for i in range(layers) if not flags[i])


def _windows(fields: Fields, without: tuple[int, ...]) -> tuple[Window, ...]:
    """Return the window of the layers that do not rotate, if it is used."""
    if not fields.flag("use_sliding_window", default=False):
        return windows_of(fields, None)
    return windows_of(fields, window_of(fields), without)


def read_gguf(_: Fields, spec: ModelSpec) -> ModelSpec:
    """Add the layers without rotation: every fourth, as llama.cpp has it."""
    rope = Rope(layers_without=every(_INTERVAL, spec.num_hidden_layers))
    return replace(spec, rope=rope)


SMOLLM3 = Family(
    name="smollm3",
    title="SmolLM3",
    adds="layers without rotation",
    architectures=("SmolLM3ForCausalLM",),
    read_config=read_config,
    tensors=named,
    gguf_names=("smollm3",),
    read_gguf=read_gguf,
)
