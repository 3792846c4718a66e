"""Safetensors checkpoints: tensors mapped from one file or shards, and damage that is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter.checkpoint.open import open_checkpoint
from tests.exporter.checkpoint.edits import (
    Q_PROJ,
    edit_json,
    edit_weights,
    refusal,
)
from tests.support.make_checkpoint import (
    hf_config,
    safetensors_header,
    tiny_spec,
)

# What is read


def test_writing_into_a_tensor_does_not_change_the_file(directory: Path) -> None:
    before = (directory / "model.safetensors").read_bytes()
    open_checkpoint(directory).tensor(Q_PROJ).zero_()
    assert (directory / "model.safetensors").read_bytes() == before


def test_a_tensor_at_an_odd_offset_is_read(directory: Path) -> None:
    expected = open_checkpoint(directory).tensor(Q_PROJ).clone()
    data = (directory / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    longer = (length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :]
    (directory / "model.safetensors").write_bytes(longer)
    opened = open_checkpoint(directory)
    where = opened.bytes_of(Q_PROJ)
    assert where is not None
    assert where.offset % 2 == 1
    assert torch.equal(opened.tensor(Q_PROJ), expected)


def test_shards_hold_the_same_weights_as_one_file(directory: Path, sharded: Path) -> None:
    whole, parts = open_checkpoint(directory), open_checkpoint(sharded)
    assert len({source.path for source in parts.stored.values()}) > 2
    for name in whole.stored:
        assert torch.equal(whole.tensor(name), parts.tensor(name))


def test_opening_reads_no_weights(directory: Path) -> None:
    # A sparse file of 100 GB of zeros: reading it would take minutes.
    spec = tiny_spec(hidden_size=65_536, intermediate_size=65_536, num_hidden_layers=2)
    assert 4 * spec.num_parameters > 10**11
    header = safetensors_header(spec.weight_shapes(), "float32")
    with (directory / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 4 * spec.num_parameters)
    (directory / "config.json").write_text(json.dumps(hf_config(spec)))
    assert open_checkpoint(directory).tensor("model.norm.weight").sum() == 0


# What is refused: tensors


def test_a_missing_tensor_is_refused_by_name(directory: Path) -> None:
    edit_weights(directory, lambda weights: weights.pop(Q_PROJ))
    message = refusal(directory)
    assert Q_PROJ in message
    assert str(directory) in message


def test_a_missing_head_suggests_that_it_is_tied(directory: Path) -> None:
    edit_weights(directory, lambda weights: weights.pop("lm_head.weight"))
    assert "tie_word_embeddings" in refusal(directory)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.block_sparse_moe.gate.weight",
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj.weight_scale",
    ],
)
def test_an_unexpected_tensor_is_refused_by_name(directory: Path, name: str) -> None:
    edit_weights(directory, lambda weights: weights.update({name: torch.ones(4)}))
    message = refusal(directory)
    assert name in message
    assert str(directory / "model.safetensors") in message


def test_a_misshaped_tensor_is_refused_with_both_shapes(directory: Path) -> None:
    edit_weights(directory, lambda weights: weights.update({Q_PROJ: torch.ones(64, 32)}))
    message = refusal(directory)
    assert Q_PROJ in message
    assert "[64, 32]; expected [64, 64]" in message


@pytest.mark.parametrize(
    ("dtype", "shown"),
    [(torch.int8, "I8"), (torch.float64, "F64"), (torch.float8_e4m3fn, "F8_E4M3")],
)
def test_a_dtype_that_weights_cannot_have_is_refused(
    directory: Path, dtype: torch.dtype, shown: str
) -> None:
    edit_weights(
        directory, lambda weights: weights.update({Q_PROJ: torch.ones(64, 64).to(dtype)})
    )  # fmt: skip
    message = refusal(directory)
    assert f"{Q_PROJ} is of type {shown}" in message
    assert "float32, float16, bfloat16" in message


@pytest.mark.parametrize("cut", [1, 1000, 100_000])
def test_a_truncated_file_is_refused_by_name(directory: Path, cut: int) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-cut])
    message = refusal(directory)
    assert f"{file} is truncated" in message
    assert "the tensor" in message


@pytest.mark.parametrize("kept", [0, 4, 8, 100])
def test_a_file_cut_within_its_header_is_refused_by_name(directory: Path, kept: int) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert f"{file} is not a whole safetensors file" in refusal(directory)


def test_bytes_after_the_last_tensor_are_refused(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"\0")
    assert "follow the last tensor" in refusal(directory)


HEADERS: list[tuple[str, Any]] = [
    ("not a JSON object", []),
    ("has no shape and data_offsets", {"a": 1}),
    ("has no shape and data_offsets", {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}),
    ("has no shape", {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}),
    ("need 4", {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}),
    ("do not follow", {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}),
]


@pytest.mark.parametrize(("said", "header"), HEADERS)
def test_a_damaged_header_is_refused(directory: Path, said: str, header: Any) -> None:
    text = json.dumps(header).encode()
    file = directory / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 8)
    assert said in refusal(directory)


def test_a_tensor_named_twice_is_refused(directory: Path) -> None:
    entry = json.dumps({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
    text = f'{{"a": {entry}, "a": {entry}}}'.encode()
    file = directory / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)
    assert "a appears twice" in refusal(directory)


# What is refused: shards


def test_an_index_naming_a_missing_shard_is_refused(sharded: Path) -> None:
    lost = sorted(sharded.glob("*.safetensors"))[1]
    lost.unlink()
    message = refusal(sharded)
    assert lost.name in message
    assert "model.safetensors.index.json" in message
    assert ".weight" in message


def test_a_truncated_shard_is_refused_by_name(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    assert f"{shard} is truncated" in refusal(sharded)


def test_a_tensor_in_another_shard_than_the_index_says_is_refused(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    first, last = sorted(file.name for file in sharded.glob("*.safetensors"))[::3]
    edit_json(index, lambda data: data["weight_map"].update({"model.embed_tokens.weight": last}))
    message = refusal(sharded)
    assert f"model.embed_tokens.weight is in {last}, but it is in {first}" in message


def test_a_tensor_that_only_the_index_or_only_a_shard_has_is_refused(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    whole = index.read_text()
    edit_json(index, lambda data: data["weight_map"].pop(Q_PROJ))
    assert f"has the tensor {Q_PROJ}" in refusal(sharded)
    index.write_text(whole)
    shard = sorted(sharded.glob("*.safetensors"))[0].name
    edit_json(index, lambda data: data["weight_map"].update({"more": shard}))
    assert "more is in" in refusal(sharded)
    assert "no shard has it" in refusal(sharded)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/hostname", "", "a\0b", "."])
def test_an_index_pointing_outside_its_directory_is_refused(sharded: Path, name: str) -> None:
    index = sharded / "model.safetensors.index.json"
    edit_json(index, lambda data: data["weight_map"].update({Q_PROJ: name}))
    assert Q_PROJ in refusal(sharded)


@pytest.mark.parametrize("weight_map", [None, {}, [1], {Q_PROJ: 3}])
def test_an_index_without_a_weight_map_is_refused(sharded: Path, weight_map: Any) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert "weight_map" in refusal(sharded)


def test_shards_without_an_index_are_refused(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    assert "download model.safetensors.index.json" in refusal(sharded)
