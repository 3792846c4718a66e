"""Granite 3 and 4 dense: multipliers of the embedding, of scores, of each branch and of the logits.

transformers: models/granite. `logits_scaling` divides, so the multiplier is its inverse.
"""

from dataclasses import replace

from exporter.families.config import no_windows, read_common
from exporter.families.family import Family
from exporter.families.names import named
from exporter.fields import Fields
from graphs.spec import AttentionSpec, ModelSpec, Multipliers


def read_config(fields: Fields) -> ModelSpec:
    """Read a `config.json`."""
    bias = fields.flag("attention_bias", default=False)
    return read_common(
        fields,
        no_windows(fields, "GraniteForCausalLM"),
        reads=("attention_bias", "mlp_bias"),
        kv_heads=fields.integer("num_attention_heads"),
        attention=AttentionSpec(
            bias=bias, output_bias=bias, scale=fields.number("attention_multiplier", 1.0)
        ),
        multipliers=Multipliers(
            embedding=fields.number("embedding_multiplier", 1.0),
            residual=fields.number("residual_multiplier", 1.0),
            logits=1 / fields.number("logits_scaling", 1.0),
        ),
        mlp_bias=fields.flag("mlp_bias", default=False),
    )


def read_gguf(fields: Fields, spec: ModelSpec) -> ModelSpec:
    """Add the multipliers; without a scale of scores, llama.cpp has 1 / sqrt(D)."""
    given = "granite.attention.scale"
    scale = fields.decimal(given) if fields.values.get(given) else None
    return replace(
        spec,
        attention=AttentionSpec(scale=scale),
        multipliers=Multipliers(
            embedding=fields.decimal("granite.embedding_scale", 1.0),
            residual=fields.decimal("granite.residual_scale", 1.0),
            logits=1 / fields.decimal("granite.logit_scale"),
        ),
    )


GRANITE = Family(
    name="granite",
    title="Granite 3 (dense)",
    adds="multipliers of the embedding, scores, branches and logits",
    architectures=("GraniteForCausalLM",),
    read_config=read_config,
    tensors=named,
    gguf_names=("granite",),
    gguf_keys=frozenset({"attention.scale", "embedding_scale", "residual_scale", "logit_scale"}),
    read_gguf=read_gguf,
)
