"""What tests of the exporter share."""

import json
from pathlib import Path

import pytest

MISTRAL_7B_CONFIG = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32000,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""The values of the public config.json of Mistral-7B-v0.1."""


@pytest.fixture
def config_only(tmp_path: Path) -> Path:
    """A directory with Mistral-7B's config.json and nothing else."""
    directory = tmp_path / "Mistral-7B-v0.1"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(MISTRAL_7B_CONFIG), encoding="utf-8")
    return directory
