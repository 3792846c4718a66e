"""The examples of `families.py` as GGUF files, as llama.cpp's `convert_hf_to_gguf.py` writes them.

Names come from the tables of the `gguf` package. What the converter does beyond renaming is done
here: it interleaves the rotated rows of what it treats like a Llama, adds 1 to Gemma's norms, and
stores rotary factors as tensors. The files were compared with those that the converter (llama.cpp
of November 2026) wrote for the same checkpoints: the specs and the weights that we read are equal.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from tests.support import families

ARCHITECTURES: Mapping[str, gguf.MODEL_ARCH] = {
    "mistral": gguf.MODEL_ARCH.LLAMA, "llama": gguf.MODEL_ARCH.LLAMA,
    "ministral3": gguf.MODEL_ARCH.MISTRAL3, "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3, "phi3": gguf.MODEL_ARCH.PHI3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2, "granite": gguf.MODEL_ARCH.GRANITE,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
}  # fmt: skip
INTERLEAVED = ("mistral", "llama", "ministral3", "granite", "smollm3")


def write(path: Path, name: str) -> Path:
    """Write an example as a GGUF file in float32."""
    example, model = families.EXAMPLES[name], families.model(name)
    config = model.config
    architecture = ARCHITECTURES[example.family]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _add_metadata(writer, example.family, config)
    table = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for stored, weight in model.state_dict().items():
        if stored == "lm_head.weight" and config.tie_word_embeddings:
            continue
        new = table.get_name(stored, try_suffixes=(".weight", ".bias"))
        assert new is not None, stored
        value = _converted(example.family, stored, weight, config)
        writer.add_tensor(new, value.contiguous().numpy())
    for new, factors in _factors(config.rope_parameters).items():
        writer.add_tensor(new, torch.tensor(factors, dtype=torch.float32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _converted(family: str, name: str, weight: Tensor, config: Any) -> Tensor:
    if family == "gemma2" and name.endswith("norm.weight"):
        return weight + 1
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    part = name.split(".")[-2]
    if family in INTERLEAVED and part in heads:
        halves = weight.reshape(heads[part], 2, -1, *weight.shape[1:])
        return halves.transpose(1, 2).reshape(weight.shape)
    return weight


def _factors(rope: Mapping[str, Any]) -> dict[str, list[float]]:
    if rope["rope_type"] == "longrope":
        return {"rope_factors_long.weight": rope["long_factor"],
                "rope_factors_short.weight": rope["short_factor"]}  # fmt: skip
    if rope["rope_type"] != "llama3":
        return {}
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    found = []
    for i in range(families.PAIRS):
        turns = rope["original_max_position_embeddings"] / (
            2 * math.pi * rope["rope_theta"] ** (i / families.PAIRS)
        )
        kept = min(1.0, max(0.0, (turns - low) / (high - low)))
        found.append(1 / ((1 - kept) / factor + kept))
    return {"rope_freqs.weight": found}


def _add_metadata(writer: gguf.GGUFWriter, family: str, config: Any) -> None:
    heads, rope = config.num_attention_heads, config.rope_parameters
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if family != "phi3":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if family == "ministral3":
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
    if family == "phi3":
        original = config.original_max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_sliding_window(config.sliding_window or 0)
        if rope["rope_type"] == "longrope":
            ratio = config.max_position_embeddings / original
            factor = math.sqrt(1 + math.log(ratio) / math.log(original))
            writer.add_rope_scaling_attn_factors(factor)
    if family == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
        writer.add_sliding_window(config.sliding_window)
    if family == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
