"""GGUF files of every family that llama.cpp converts, against the model of transformers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporter.checkpoint.config_gguf import spec_from_gguf
from exporter.checkpoint.gguf_file import read_gguf
from exporter.checkpoint.open import open_checkpoint
from exporter.decoder.load import load_decoder
from exporter.families.catalogue import BY_GGUF_NAME
from graphs.errors import MistralcError
from tests.support import families, families_gguf, tiny

TOLERANCE = 1e-5  # as against transformers' own files
LOST = {
    "gemma2": "query_pre_attn_scalar: llama.cpp scales scores by the size of a head",
}
NAMES = ["mistral", "llama, biases", "llama 3", "ministral3", "qwen2", "qwen3", "phi3, window",
         "phi3, longrope", "phi4, partial", "gemma2", "granite", "smollm3"]  # fmt: skip


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    return {
        name: families_gguf.write(folder / f"{number}.gguf", name)
        for number, name in enumerate(NAMES)
    }


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(files: dict[str, Path], name: str) -> None:
    checkpoint = open_checkpoint(files[name])
    spec, scaling = checkpoint.spec, checkpoint.spec.rope_scaling
    if name == "gemma2":
        assert spec.attention.scale == 24**-0.5, LOST[name]
        spec = replace(spec, attention=replace(spec.attention, scale=20**-0.5))
    for length in families.EXAMPLES[name].lengths:
        if scaling is not None:
            spec = replace(spec, rope_scaling=scaling.for_context(length))
        ids = tiny.tokens(spec, length)
        got = torch.from_numpy(tiny.at_once(load_decoder(spec, checkpoint.tensor), ids))
        expected = families.logits(name, ids.tolist())
        assert (got - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_every_architecture_is_read() -> None:
    assert {families.EXAMPLES[name].family for name in NAMES} - {"mistral"} == {
        family.name for family in BY_GGUF_NAME.values()
    }


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("qwen2", "qwen2.logit_scale", 1.0), ("qwen2", "qwen2.attention.clamp_kqv", 0.0),
        ("mistral", "llama.nextn_predict_layers", 0), ("mistral", "llama.attention.scale", 0.0),
        ("phi3, window", "phi3.pooling_type", 0), ("qwen3", "qwen3.embedding_scale", [1.0, 1.0]),
        ("granite", "granite.attention.max_alibi_bias", 0.0),
        ("gemma2", "gemma2.rope.scaling.yarn_ext_factor", 1.0),
    ],
)  # fmt: skip
def test_keys_with_values_that_change_nothing_are_accepted(
    files: dict[str, Path], name: str, key: str, value: Any
) -> None:
    file = read_gguf(files[name])
    plain = spec_from_gguf(file.metadata, tied=True)
    assert spec_from_gguf(file.metadata | {key: value}, tied=True) == plain
    changed = [2.0, 1.0] if isinstance(value, list) else value + 2
    with pytest.raises(MistralcError, match=key):
        spec_from_gguf(file.metadata | {key: changed}, tied=True)


def test_the_27b_of_gemma_2_is_known_by_its_layers(files: dict[str, Path]) -> None:
    """llama.cpp scales its scores by hidden size / heads, 144, and not by the size of a head."""
    metadata = read_gguf(files["gemma2"]).metadata
    large = spec_from_gguf(metadata | {"gemma2.block_count": 46}, tied=True)
    assert large.attention.scale == (64 // 4) ** -0.5
    assert large.layer_windows[:3] == (families.WINDOW, None, families.WINDOW)


def test_rotary_factors_come_in_pairs(files: dict[str, Path]) -> None:
    file = read_gguf(files["phi3, longrope"])
    short = {"rope_factors_short.weight": (1.0,) * families.PAIRS}
    with pytest.raises(MistralcError, match=r"lacks the tensor rope_factors_long\.weight"):
        spec_from_gguf(file.metadata, tied=True, numbers=short)


def test_rotary_factors_of_one_are_none(files: dict[str, Path]) -> None:
    metadata = read_gguf(files["mistral"]).metadata
    ones = {"rope_freqs.weight": tuple(np.ones(families.PAIRS).tolist())}
    assert spec_from_gguf(metadata, tied=True, numbers=ones).rope_scaling is None
