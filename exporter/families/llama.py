"""Llama 1 to 3, and what is converted to its architecture: no window, biases if the file says so.

transformers: models/llama. GGUF's architecture `llama` is also that of Mistral.
"""

from exporter.families.config import no_windows, read_common
from exporter.families.family import Family
from exporter.families.names import named
from exporter.fields import Fields
from graphs.spec import AttentionSpec, ModelSpec


def read_config(fields: Fields) -> ModelSpec:
    """Read a `config.json`."""
    bias = fields.flag("attention_bias", default=False)
    return read_common(
        fields,
        no_windows(fields, "LlamaForCausalLM"),
        reads=("attention_bias", "mlp_bias"),
        kv_heads=fields.integer("num_attention_heads"),
        attention=AttentionSpec(bias=bias, output_bias=bias),
        mlp_bias=fields.flag("mlp_bias", default=False),
    )


LLAMA = Family(
    name="llama",
    title="Llama 1, 2, 3, 3.1, 3.2 (text), 3.3, TinyLlama, SmolLM2",
    adds="biases, where the configuration says so",
    architectures=("LlamaForCausalLM",),
    read_config=read_config,
    tensors=named,
    gguf_names=("llama",),
)
