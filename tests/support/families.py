"""Small checkpoints of every family, made by transformers itself, as its own classes write them.

Random weights are larger than transformers' initial ones, so that logits are not close to zero, and
norms, biases and factors are all different from those that change nothing.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 96
SIZES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
WINDOW = 12
PAIRS = 8  # rotated pairs of a head of 16 features
YARN = {
    "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 8.0, "beta_fast": 8.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 32, "mscale": 1.0, "mscale_all_dim": 0.5,
}  # fmt: skip
MINISTRAL3 = {**YARN, "llama_4_scaling_beta": 0.3, "max_position_embeddings": 256}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip


VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "image_size": 28,
    "num_attention_heads": 2, "patch_size": 14, "head_dim": 16, "model_type": "pixtral",
}  # fmt: skip


def _longrope(pairs: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope", "rope_theta": 10_000.0,
        "short_factor": [1 + 0.05 * i for i in range(pairs)],
        "long_factor": [1 + 0.9 * i for i in range(pairs)],
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Example:
    """One kind of checkpoint: the family, transformers' names, and what its configuration adds.

    `lengths` are those of the texts to compare, up to five windows.
    """

    family: str
    model: str  # a class of transformers, whose configuration has the same first name
    settings: Mapping[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = (5 * WINDOW,)


EXAMPLES: Mapping[str, Example] = {
    "mistral": Example(family="mistral", model="MistralForCausalLM",
                       settings={"sliding_window": None}),
    "mistral, window": Example(family="mistral", model="MistralForCausalLM",
                               settings={"sliding_window": WINDOW}),
    "ministral, window": Example(
        family="ministral", model="MinistralForCausalLM",
        settings={"sliding_window": WINDOW, "head_dim": 24,
                  "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "ministral3": Example(family="ministral3", model="Ministral3ForCausalLM",
                          settings={"head_dim": 16, "rope_parameters": MINISTRAL3},
                          lengths=(20, 120)),
    "ministral3, window": Example(
        family="ministral3", model="Ministral3ForCausalLM",
        settings={"head_dim": 24, "rope_parameters": MINISTRAL3, "sliding_window": WINDOW},
    ),
    "mistral3": Example(
        family="mistral3", model="Mistral3ForConditionalGeneration",
        settings={"text_config": {"model_type": "mistral", "sliding_window": None}},
    ),
    "mistral3, ministral3": Example(
        family="mistral3", model="Mistral3ForConditionalGeneration",
        settings={"text_config": {"model_type": "ministral3", "head_dim": 16,
                                  "rope_parameters": MINISTRAL3}},
        lengths=(120,),
    ),
    "llama": Example(family="llama", model="LlamaForCausalLM"),
    "llama, biases": Example(family="llama", model="LlamaForCausalLM",
                             settings={"attention_bias": True, "mlp_bias": True}),
    "llama 3": Example(family="llama", model="LlamaForCausalLM",
                       settings={"rope_parameters": LLAMA3}, lengths=(160,)),
    "qwen2": Example(family="qwen2", model="Qwen2ForCausalLM"),
    "qwen2, tied, yarn": Example(
        family="qwen2", model="Qwen2ForCausalLM",
        settings={"tie_word_embeddings": True, "rope_parameters": YARN}, lengths=(160,),
    ),
    "qwen2, window": Example(
        family="qwen2", model="Qwen2ForCausalLM",
        settings={"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": Example(family="qwen3", model="Qwen3ForCausalLM", settings={"head_dim": 24}),
    "qwen3, window": Example(
        family="qwen3", model="Qwen3ForCausalLM",
        settings={"head_dim": 32, "use_sliding_window": True, "sliding_window": WINDOW,
                  "max_window_layers": 0, "attention_bias": True},
    ),
    "phi3": Example(family="phi3", model="Phi3ForCausalLM"),
    "phi3, window": Example(family="phi3", model="Phi3ForCausalLM",
                            settings={"sliding_window": WINDOW}),
    "phi3, longrope": Example(
        family="phi3", model="Phi3ForCausalLM",
        settings={"original_max_position_embeddings": 64, "rope_parameters": _longrope(PAIRS),
                  "sliding_window": 1000},
        lengths=(64, 65, 200),
    ),
    "phi4, partial": Example(
        family="phi3", model="Phi3ForCausalLM",
        settings={"original_max_position_embeddings": 64, "tie_word_embeddings": True,
                  "rope_parameters": {**_longrope(6), "partial_rotary_factor": 0.75}},
        lengths=(60, 200),
    ),
    "gemma2": Example(
        family="gemma2", model="Gemma2ForCausalLM",
        settings={"head_dim": 24, "query_pre_attn_scalar": 20, "sliding_window": WINDOW,
                  "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    ),
    "gemma2, no window": Example(
        family="gemma2", model="Gemma2ForCausalLM",
        settings={"head_dim": 16, "layer_types": ["full_attention"] * 2,
                  "attn_logit_softcapping": 4.0, "final_logit_softcapping": None},
    ),
    "granite": Example(
        family="granite", model="GraniteForCausalLM",
        settings={"embedding_multiplier": 3.0, "residual_multiplier": 0.22, "logits_scaling": 0.3,
                  "attention_multiplier": 0.11},
    ),
    "smollm3": Example(family="smollm3", model="SmolLM3ForCausalLM",
                       settings={"num_hidden_layers": 4}),
    "smollm3, window": Example(
        family="smollm3", model="SmolLM3ForCausalLM",
        settings={"no_rope_layers": [1, 0], "use_sliding_window": True, "sliding_window": WINDOW,
                  "tie_word_embeddings": False},
    ),
}  # fmt: skip
"""By name. Those of the family `mistral3` have a vision tower beside their text part."""


WIDE: Mapping[str, Any] = {
    "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8,
}  # fmt: skip
"""Sizes for which TensorRT has its kernels. Heads are four times as large as otherwise."""


@cache
def model(name: str, *, wide: bool = False) -> transformers.PreTrainedModel:
    """The model of an example, with random weights, for eager use in float32."""
    example = EXAMPLES[name]
    kind: Any = getattr(transformers, example.model)
    text = example.settings.get("text_config", example.settings)
    settings = {**SIZES, **(_widened(text) if wide else text)}
    if "text_config" in example.settings:
        settings = {"text_config": settings, "vision_config": VISION, "tie_word_embeddings": False}
    config = kind.config_class(**settings)
    config._attn_implementation = "eager"
    return randomized(kind(config), seed=len(name))


def _widened(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an example for the sizes of `WIDE`."""
    found = {**settings, **WIDE}
    if "head_dim" in found:
        found["head_dim"] *= 4
    rope = dict(found.get("rope_parameters", {}))
    for key in ("short_factor", "long_factor"):
        if key in rope:
            rope[key] = [one for one in rope[key] for _ in range(4)]
            found["rope_parameters"] = rope
    return found


def randomized(found: transformers.PreTrainedModel, seed: int) -> transformers.PreTrainedModel:
    """Replace all weights, so that every part of the model changes its logits."""
    draw = torch.Generator().manual_seed(seed)
    stores_gain_minus_1 = found.config.model_type == "gemma2"
    for name, weight in found.named_parameters():
        with torch.no_grad():
            weight.normal_(0, _spread(name, weight), generator=draw)
            if _is_gain(name, weight) and not stores_gain_minus_1:
                weight.add_(1)
    found.train(mode=False)
    return found


def _is_gain(name: str, weight: nn.Parameter) -> bool:
    return weight.dim() == 1 and name.endswith("weight")


def _spread(name: str, weight: nn.Parameter) -> float:
    if _is_gain(name, weight):
        return 0.2
    if weight.dim() == 1:  # a bias
        return 0.5
    return float(weight.shape[-1] ** -0.5)


def write(directory: Path, name: str, *, wide: bool = False) -> Path:
    """Write the checkpoint of an example as transformers does."""
    model(name, wide=wide).save_pretrained(directory)
    return directory


def logits(name: str, ids: list[int]) -> torch.Tensor:
    """transformers' logits [n, V] for the whole text at once, without a cache."""
    with torch.inference_mode():
        found: torch.Tensor = model(name)(torch.tensor([ids]), use_cache=False).logits[0]
    return found


def config(name: str) -> dict[str, Any]:
    """The `config.json` that transformers writes for an example."""
    found: dict[str, Any] = json.loads(model(name).config.to_json_string(use_diff=False))
    return found
