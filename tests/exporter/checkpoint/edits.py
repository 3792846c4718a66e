"""Change checkpoints made by `make_checkpoint.py`, and open them to see the error."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.checkpoint.open import open_checkpoint
from exporter.families import names as weight_names
from graphs.errors import MistralcError
from graphs.spec import ModelSpec
from tests.support.make_checkpoint import chunks, tiny_spec, to_interleaved

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def small_spec(**overrides: Any) -> ModelSpec:
    """A model of a few kilobytes, with a vocabulary too small for a tokenizer."""
    small = {"vocab_size": 8, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
             "head_dim": 8}  # fmt: skip
    return tiny_spec(**(small | overrides))


def drawn(spec: ModelSpec, name: str) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(list(chunks(spec, name, 0))))


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite model.safetensors with the safetensors library, not with our own writer."""
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors")


def refusal(path: str | Path) -> str:
    with pytest.raises(MistralcError) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_gguf(
    path: Path,
    spec: ModelSpec,
    kinds: dict[str, gguf.GGMLQuantizationType] | None = None,
    extra: dict[str, np.ndarray[Any, Any]] | None = None,
    blocks: dict[str, tuple[np.ndarray[Any, Any], str]] | None = None,
    parts: int = 0,
    **metadata: int,
) -> Path:
    """Write a GGUF file with the gguf package; `kinds` are block types by canonical name.

    `blocks` are ready rows of a block type, in the file's order. With `parts`, each file has that
    many tensors.
    """
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=parts)
    numbers = {
        "block_count": spec.num_hidden_layers, "context_length": 512,
        "embedding_length": spec.hidden_size, "feed_forward_length": spec.intermediate_size,
        "attention.head_count": spec.num_attention_heads, "vocab_size": spec.vocab_size,
        "attention.head_count_kv": spec.num_key_value_heads,
    }  # fmt: skip
    for key, value in (numbers | metadata).items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    for name in spec.weight_shapes():
        if name in (blocks or {}):
            data, type_name = (blocks or {})[name]
            raw = gguf.GGMLQuantizationType[type_name]
            writer.add_tensor(weight_names.stored_name(name, "gguf", spec), data, raw_dtype=raw)
            continue
        weight = drawn(spec, name)
        if (heads := weight_names.rotated_heads(spec, name)) is not None:
            weight = to_interleaved(weight, heads)
        kind = (kinds or {}).get(name, gguf.GGMLQuantizationType.F32)
        data = gguf.quants.quantize(weight.numpy(), kind)
        writer.add_tensor(weight_names.stored_name(name, "gguf", spec), data, raw_dtype=kind)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
