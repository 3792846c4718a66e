"""Mistral and Ministral-8B: grouped queries, a sliding window in all, some or no layers.

transformers: models/mistral and models/ministral. Defaults are those of its configurations.
"""

from exporter.families.config import read_common, window_of, windows_of
from exporter.families.family import Family
from exporter.families.names import named
from exporter.fields import Fields
from graphs.spec import ModelSpec

_WINDOW = 4096  # of MistralConfig and MinistralConfig, if the key is absent


def read_config(fields: Fields) -> ModelSpec:
    """Read a `config.json`; `sliding_window` holds for every layer unless `layer_types` differ."""
    return read_common(fields, windows_of(fields, window_of(fields, _WINDOW)))


MISTRAL = Family(
    name="mistral",
    title="Mistral 7B, Nemo, Small (2501), Large, Codestral 22B, Mathstral, Devstral (2505)",
    adds="a sliding window, or none",
    architectures=("MistralForCausalLM",),
    read_config=read_config,
    tensors=named,
    gguf_names=("llama",),
    left_out=(  # in Mistral's own files of models with images
        "vision_encoder.", "vision_language_adapter.", "patch_merger.", "pre_mm_projector_norm.",
    ),
)  # fmt: skip
MINISTRAL = Family(
    name="ministral",
    title="Ministral 8B",
    adds="windows by layer",
    architectures=("MinistralForCausalLM",),
    read_config=read_config,
    tensors=named,
)
