"""Ministral 3 and Devstral 2: YaRN, and queries scaled by their position as in Llama 4.

And the text part of models with images: Mistral Small 3.1 and 3.2, Magistral, Ministral 3. Their
weights lie under `language_model.`, or under `model.language_model.` as transformers 5 names its
modules; the vision tower and its projector are left out. transformers: models/ministral3 and
models/mistral3.
"""

from dataclasses import replace

from exporter.families.config import read_common, window_of, windows_of
from exporter.families.family import Family
from exporter.families.mistral import read_config
from exporter.families.names import named
from exporter.families.rotary import read_rotary, rotary_sections
from exporter.fields import Fields
from graphs.errors import MistralcError
from graphs.rope import EVERYWHERE, Rope
from graphs.spec import ModelSpec

_SCALE = "llama_4_scaling_beta"
_KEYS = frozenset({_SCALE, "max_position_embeddings"})


def read_ministral3(fields: Fields) -> ModelSpec:
    """Read a `config.json`."""
    rotary = read_rotary(fields, also=_KEYS)
    sections = [section for section in rotary_sections(fields) if section.has(_SCALE)]
    if not sections or rotary.scaling is None:
        raise MistralcError(
            f"{fields.origin}: the rotary embedding has no `{_SCALE}` beside its scaling; expected "
            "both, as transformers' Ministral3 needs them. Use the configuration file that was "
            "published with these weights."
        )
    return read_common(
        fields,
        windows_of(fields, window_of(fields)),
        rotary=rotary,
        rope=Rope(
            query_scale=sections[0].number(_SCALE),
            query_scale_length=rotary.scaling.original_max_position_embeddings,
        ),
    )


def read_gguf(fields: Fields, spec: ModelSpec) -> ModelSpec:
    """Add the scale of queries, which llama.cpp counts in the trained length."""
    key = "mistral3.attention.temperature_scale"
    if not fields.values.get(key) or spec.rope_scaling is None:
        return spec
    length = spec.rope_scaling.original_max_position_embeddings
    scale = fields.decimal(key)
    return replace(spec, rope=replace(EVERYWHERE, query_scale=scale, query_scale_length=length))


_TEXT = {"mistral": read_config, "ministral3": read_ministral3}


def read_text_part(fields: Fields) -> ModelSpec:
    """Read `text_config` of a `config.json`."""
    text = fields.section("text_config")
    if text is None:
        raise fields.invalid("text_config", "the configuration of the language model")
    kind = text.text("model_type", "mistral")
    if kind not in _TEXT:
        raise MistralcError(
            f"{text.origin}: `model_type` is {kind[:40]}; expected one of {', '.join(_TEXT)}. The "
            "README lists the models that are supported: use another checkpoint."
        )
    values = dict(text.values)
    if not text.has("tie_word_embeddings") and fields.has("tie_word_embeddings"):
        values["tie_word_embeddings"] = fields.values["tie_word_embeddings"]
    return _TEXT[kind](Fields(values, text.origin))


MINISTRAL3 = Family(
    name="ministral3",
    title="Ministral 3, Devstral 2",
    adds="YaRN; queries scaled by their position",
    architectures=("Ministral3ForCausalLM",),
    read_config=read_ministral3,
    tensors=named,
    gguf_names=("mistral3",),
    gguf_keys=frozenset({"attention.temperature_scale"}),
    read_gguf=read_gguf,
)

MISTRAL3 = Family(
    name="mistral3",
    title="Mistral Small 3.1 and 3.2, Magistral, Ministral 3, Devstral Small 2, all with images",
    adds="the text part only, of the architecture Mistral or Ministral 3",
    architectures=("Mistral3ForConditionalGeneration",),
    read_config=read_text_part,
    tensors=named,
    prefixes={
        "language_model.model.": "model.",
        "language_model.lm_head.": "lm_head.",
        "model.language_model.": "model.",
    },
    left_out=(
        "vision_tower.", "multi_modal_projector.", "model.vision_tower.",
        "model.multi_modal_projector.",
    ),
    head_may_be_tied=True,
)  # fmt: skip
