"""Read a Hugging Face `config.json` into a ModelSpec. Knows nothing about weights or torch.

The architecture chooses the family (`exporter/families/`), which reads its own settings. A setting
that changes what is computed, and that the decoder does not compute, is an error that names it. How
weights are quantized is read in `quantized/`.
`config_mistral.py` reads Mistral's `params.json`, `config_gguf.py` GGUF metadata.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from exporter.families.catalogue import BY_ARCHITECTURE, BY_MODEL_TYPE
from exporter.families.config import USE_ANOTHER
from exporter.families.family import Family
from exporter.fields import Fields
from graphs.errors import MistralcError, UsageError
from graphs.spec import ModelSpec


def override_window(spec: ModelSpec, window: int) -> ModelSpec:
    """Give every layer a sliding window of `window` tokens (`--window`)."""
    if window < 1:
        raise UsageError(f"--window is {window}; expected at least 1 token.")
    return replace(spec, layer_windows=(window,) * spec.num_hidden_layers)


def spec_from_hf(config: Mapping[str, Any], origin: str = "config.json") -> ModelSpec:
    """Read a Hugging Face `config.json`. Errors name the file as `origin`.

    Raises MistralcError naming the first setting that is missing, of the wrong type, or not one
    that the decoder computes.
    """
    fields = Fields(config, origin)
    family = family_of(fields)
    return family.read_config(fields)


def family_of(fields: Fields) -> Family:
    """Return the family of a `config.json`, if `architectures` and `model_type` agree."""
    if fields.has("peft_type"):
        raise MistralcError(
            f"{fields.origin} is the configuration of an adapter (`peft_type` is "
            f"{fields.text('peft_type')}); expected that of a model. Rename it to "
            "adapter_config.json, and give `BASE --lora` and this directory."
        )
    names = fields.values.get("architectures") or []
    expected = f"one of {', '.join(BY_ARCHITECTURE)}"
    if not isinstance(names, list) or len(names) > 1:
        raise fields.invalid("architectures", f"a list with {expected}")
    if names and (not isinstance(names[0], str) or names[0] not in BY_ARCHITECTURE):
        raise MistralcError(
            f"{fields.origin}: the architecture is {names[0]}; expected {expected}. {USE_ANOTHER}"
        )
    named = BY_ARCHITECTURE[names[0]] if names else None
    model_type = fields.text("model_type", None if named is None else named.name)
    family = BY_MODEL_TYPE.get(model_type) if named is None else named
    if family is None or model_type != family.name:
        expected_type = f"one of {', '.join(BY_MODEL_TYPE)}" if named is None else named.name
        because = "" if named is None else f", because the architecture is {names[0]}"
        raise MistralcError(
            f"{fields.origin}: `model_type` is {model_type}; expected "
            f"{expected_type}{because}. "
            f"{USE_ANOTHER}"
        )
    return family
