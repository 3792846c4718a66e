"""PEFT adapters for tiny checkpoints, made and merged by peft. Asserts nothing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

FORMS: Mapping[str, Mapping[str, Any]] = {
    "LoRA": {"target_modules": "all-linear"},
    "rsLoRA": {"target_modules": "all-linear", "use_rslora": True},
    "DoRA": {"target_modules": ["q_proj", "v_proj", "down_proj"], "use_dora": True},
    "ranks by pattern": {
        "target_modules": ["q_proj", "v_proj", "o_proj"],
        "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 32},
    },
    "norms saved": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
    "embedding saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "both ends saved": {"target_modules": ["q_proj"],
                        "modules_to_save": ["embed_tokens", "lm_head"]},
    "LoRA of the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA of the output layer": {"target_modules": ["q_proj", "lm_head"]},
    "new tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    "resized": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"],
                "resize": 8},
    "resized, not trained": {"target_modules": ["q_proj"], "resize": 8,
                             "save_embedding_layers": True},
}  # fmt: skip
"""Options of LoraConfig by name; `resize` adds rows to the embedding before."""


def make(
    base: Path, folder: Path, options: Mapping[str, Any], *, seed: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Path:  # fmt: skip
    """Write an adapter with random numbers for the checkpoint `base`."""
    options = dict(options)
    model = _base(base, options.pop("resize", 0), torch.float32)
    saved = options.pop("save_embedding_layers", "auto")
    config = LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, **options})
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.05 * noise * parameter.data.abs().mean().clamp_min(0.3)
    adapted.to(dtype).save_pretrained(str(folder), save_embedding_layers=saved)
    return folder


def merge(
    base: Path, adapters: list[tuple[Path, float]], *, resize: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Any:  # fmt: skip
    """The model that peft merges, one adapter after another."""
    model = _base(base, resize, dtype)
    for path, weight in adapters:
        adapted = PeftModel.from_pretrained(model, path)
        layers: list[Any] = list(adapted.modules())
        for module in layers:
            if hasattr(module, "set_scale") and hasattr(module, "lora_A"):
                module.set_scale("default", weight)
        model = adapted.merge_and_unload()
    return model


def _base(path: Path, resize: int, dtype: torch.dtype) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
    if resize:
        torch.manual_seed(0)
        model.resize_token_embeddings(model.config.vocab_size + resize, mean_resizing=False)
    return model
