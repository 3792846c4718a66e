"""Checkpoints and options that `export` refuses; nothing is left of the attempt."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from exporter import export as exporting
from tests.conftest import Command
from tests.exporter.cli.damage_checkpoint import configure, poison
from tests.support.commands import refused
from tests.support.make_checkpoint import tiny_spec, write_checkpoint
from tests.support.tiny import traced


@pytest.fixture
def refuse_export(mistralc: Command, tmp_path: Path) -> Callable[..., None]:
    """Assert that an export is refused and leaves no file behind."""

    def run(source: object, *arguments: object, message: tuple[str, ...], code: int = 1) -> None:
        out = tmp_path / "out"
        out.mkdir()
        refused(mistralc("export", source, "-o", out / "bundle", *arguments), *message, code=code)
        assert list(out.iterdir()) == [], "the refused export left files behind"
        out.rmdir()
        refused(mistralc("export", source, "-o", out / "bundle", *arguments), *message, code=code)
        assert not out.exists(), "the refused export left the directory of the bundle behind"

    return run


def test_a_missing_path_is_refused(refuse_export: Callable[..., None], tmp_path: Path) -> None:
    missing = tmp_path / "no such checkpoint"
    refuse_export(missing, message=("There is no checkpoint at", str(missing), "smollm2"))


def test_an_empty_directory_is_refused(refuse_export: Callable[..., None], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    refuse_export(empty, message=(str(empty), "empty directory", "config.json"))


def test_a_file_that_is_not_a_checkpoint_is_refused(
    refuse_export: Callable[..., None], tmp_path: Path
) -> None:
    file = tmp_path / "model.txt"
    file.write_text("weights", encoding="utf-8")
    refuse_export(file, message=(str(file), "not a GGUF file"))


def test_a_truncated_weights_file_is_refused(
    refuse_export: Callable[..., None], checkpoint: Path
) -> None:
    weights = checkpoint / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1000)
    refuse_export(checkpoint, message=("model.safetensors", "truncated", "Download the file again"))


def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "sharded", tiny_spec(window=8), shard_size=100_000)


def test_a_truncated_shard_is_refused(refuse_export: Callable[..., None], tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size // 2)
    refuse_export(folder, message=(shard.name, "truncated", "Download the file again"))


def test_an_index_that_names_a_missing_shard_is_refused(
    refuse_export: Callable[..., None], tmp_path: Path
) -> None:
    folder = sharded(tmp_path)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    refuse_export(
        folder, message=("model.safetensors.index.json", shard.name, "Download the missing one")
    )


def test_weights_of_an_unsupported_type_are_refused(
    refuse_export: Callable[..., None], checkpoint: Path
) -> None:
    weights = checkpoint / "model.safetensors"
    data = weights.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(b'"model.norm.weight":{"dtype":"F32"',
                                          b'"model.norm.weight":{"dtype":"I32"')  # fmt: skip
    assert header != data[8 : 8 + length]
    weights.write_bytes(data[:8] + header + data[8 + length :])
    refuse_export(checkpoint, message=("model.norm.weight", "I32", "float32", "--precision"))


@pytest.mark.parametrize(("value", "count"), [(np.nan, "1 NaN"), (np.inf, "1 infinite")])
def test_nan_and_infinite_weights_are_refused(
    mistralc: Command,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Path,
    tmp_path: Path,
    value: float,
    count: str,
) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"  # merged with other weights by a pass
    poison(checkpoint / "model.safetensors", name, value)
    monkeypatch.setattr(exporting, "trace", traced)
    before = sorted(tmp_path.iterdir())
    refused(
        mistralc("export", checkpoint, "-o", tmp_path / "made" / "bundle"),
        name, count, "download it again",
    )  # fmt: skip
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_local_experts": 8}, ("num_local_experts", "mixture of experts", "another")),
        ({"attention_bias": True}, ("attention_bias", "biases", "another")),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
            ("dynamic", "linear", "another"),
        ),
        ({"hidden_act": "gelu"}, ("hidden_act", "gelu", "silu")),
        ({"architectures": ["GemmaForCausalLM"]}, ("GemmaForCausalLM", "MistralForCausalLM")),
        ({"num_hidden_layers": None}, ("num_hidden_layers", "missing")),
        ({"hidden_size": 128}, ("model.embed_tokens.weight", "[320, 64]", "[320, 128]")),
    ],
    ids=["experts", "bias", "rope scaling", "activation", "architecture", "missing", "shape"],
)
def test_an_unsupported_configuration_is_refused(
    refuse_export: Callable[..., None],
    checkpoint: Path,
    values: Mapping[str, Any],
    message: tuple[str, ...],
) -> None:
    configure(checkpoint, **values)
    refuse_export(checkpoint, message=message)


def test_a_gguf_of_an_unsupported_architecture_is_refused(
    refuse_export: Callable[..., None], tmp_path: Path
) -> None:
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "falcon")
    writer.add_block_count(2)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refuse_export(path, message=(str(path), "falcon", "llama"))


def test_a_checkpoint_without_a_tokenizer_is_refused(
    refuse_export: Callable[..., None], checkpoint: Path
) -> None:
    (checkpoint / "tokenizer.json").unlink()
    refuse_export(checkpoint, message=("no tokenizer", "tokenizer.model"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "tpu"), ("--target", "'tpu'", "cpu")),
        (("--precision", "int3"), ("--precision", "'int3'", "fp32")),
        (("--window", "8", "--context", "9"), ("--window and --context exclude each other",)),
        (("--context", "64"), ("--context is 64", "has a window of 8", "Leave it out")),
    ],
    ids=["target", "precision", "window and context", "context of a sliding model"],
)
def test_contradictory_or_unknown_options_are_refused(
    refuse_export: Callable[..., None],
    sliding_checkpoint: Path,
    arguments: tuple[str, ...],
    message: tuple[str, ...],
) -> None:
    refuse_export(sliding_checkpoint, *arguments, message=message, code=2)


def test_a_context_beyond_the_checkpoints_positions_is_refused(
    refuse_export: Callable[..., None], plain_checkpoint: Path
) -> None:
    message = ("--context is 513", "512", "--window")
    refuse_export(plain_checkpoint, "--context", 513, message=message, code=2)
