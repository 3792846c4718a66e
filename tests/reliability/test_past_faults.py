"""Regression tests for faults that fuzzing found, by reader."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from calib.layers.work_directory import LayerResult, WorkDirectory
from exporter.bundle.staging import write_json, write_tokenizer
from exporter.tokenizer.bpe import merges_from_ranks
from exporter.tokenizer.read import convert_file, read_tokenizer
from exporter.tokenizer.tekken import read_tekken
from graphs.errors import MistralcError
from graphs.manifest import CHECKSUM, FILE_NAME, _checksum, read_manifest
from runtime.bundle.open import cache_file, open_bundle
from runtime.text.chat_template import ChatTemplate
from runtime.text.tokenizer import Tokenizer
from tests.reliability.harness.guard import outcome_of
from tests.reliability.targets.bundles import write_bundle
from tests.reliability.targets.checkpoints import gguf_bytes
from tests.reliability.targets.tokenizers import sentencepiece_model
from tests.support.make_checkpoint import tiny_spec, write_checkpoint


def forged(folder: Path, **values: Any) -> Path:
    """Write a bundle whose manifest has other values and a matching checksum."""
    write_bundle(folder)
    data = json.loads((folder / FILE_NAME).read_bytes()) | values
    del data[CHECKSUM]
    text = json.dumps(data | {CHECKSUM: _checksum(data)}, indent=2) + "\n"
    (folder / FILE_NAME).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"target": {}}, "target"), ({"activation": "int3"}, "activation"),
        ({"checkpoint": "tiny"}, "checkpoint"), ({"checkpoint": {"name": "x"}}, "checkpoint"),
        ({"model": "huggingface"}, "model"), ({"engine": []}, "engine"),
        ({"golden": None}, "golden"), ({"passes": []}, "passes"),
        ({"files": {"model.onnx": {"size": "1", "sha256": "0" * 64}}}, "files, model.onnx"),
        ({"files": {"model.onnx": {"size": 1, "sha256": 5}}}, "files, model.onnx"),
    ],
)  # fmt: skip
def test_a_manifest_field_of_the_wrong_type_is_named_in_the_refusal(
    tmp_path: Path, values: dict[str, Any], named: str
) -> None:
    with pytest.raises(MistralcError, match=rf"does not have the fields .*{named}"):
        read_manifest(forged(tmp_path, **values))


@pytest.mark.parametrize(
    "changes", [{"rope_theta": 1e999}, {"layer_windows": [8.5]}, {"vocab_size": 2**63},
                {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}],
)  # fmt: skip
def test_a_manifest_with_an_impossible_model_is_refused(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    write_bundle(tmp_path / "good")
    model = read_manifest(tmp_path / "good").model.to_json()
    with pytest.raises(MistralcError, match="expected"):
        read_manifest(forged(tmp_path / "bad", model=model | changes))


def test_a_long_file_name_is_truncated_in_the_message(tmp_path: Path) -> None:
    entry = {"size": 1, "sha256": "0" * 64}
    good = json.loads(write_bundle(tmp_path / "good").to_text())["files"]
    with pytest.raises(MistralcError, match="could not be read") as refusal:
        open_bundle(forged(tmp_path / "bad", files=good | {"x" * 5000: entry}))
    assert len(str(refusal.value)) < 1500
    assert str(refusal.value).endswith("Check its permissions and the disk.")


def test_a_deeply_nested_hash_cache_is_ignored(tmp_path: Path) -> None:
    write_bundle(tmp_path)
    open_bundle(tmp_path)
    cache = cache_file()
    assert cache is not None
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text("[" * 100_000, encoding="utf-8")
    open_bundle(tmp_path)


@pytest.mark.parametrize(
    ("file", "values", "named"),
    [
        ("generation_config", {"eos_token_id": [[2]]}, "eos_token_id"),
        ("generation_config", {"eos_token_id": [2**40]}, "eos_token_id"),
        ("tokenizer_config", {"bos_token_id": [1]}, "bos_token_id"),
        ("tokenizer_config", {"bos_token_id": True}, "bos_token_id"),
        ("tokenizer_config", {"chat_template": 5}, "chat_template"),
        ("tokenizer_config", {"add_bos_token": "yes"}, "add_bos_token"),
    ],
)
def test_a_bundles_tokenizer_setting_of_the_wrong_type_is_named_in_the_refusal(
    tmp_path: Path, file: str, values: dict[str, Any], named: str
) -> None:
    write_tokenizer(read_tokenizer(write_checkpoint(tmp_path / "model", tiny_spec())), tmp_path)
    path = tmp_path / f"{file}.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | values), encoding="utf-8")
    with pytest.raises(MistralcError, match=f"`{named}`"):
        Tokenizer.load(tmp_path)


def test_a_deeply_nested_tokenizer_setting_is_refused(tmp_path: Path) -> None:
    for name in ("tokenizer", "tokenizer_config", "generation_config"):
        (tmp_path / f"{name}.json").write_text("[" * 100_000, encoding="utf-8")
    (tmp_path / "tokenizer.json").write_bytes(
        (write_checkpoint(tmp_path / "model", tiny_spec()) / "tokenizer.json").read_bytes()
    )
    with pytest.raises(MistralcError, match="is not JSON"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", {"chat_template": 5}, "chat_template"),
        ("tokenizer_config.json", {"add_bos_token": "yes"}, "add_bos"),
        ("tokenizer_config.json", {"bos_token": ["<s>"]}, "bos"),
        ("tokenizer_config.json", {"eos_token": "\ud800"}, "has no token"),
        ("generation_config.json", {"eos_token_id": [2**70]}, "eos_token_id"),
        ("config.json", {"bos_token_id": 2**70}, "has no token"),
        ("chat_template.jinja", b"\xff\xfe", "text in UTF-8"),
    ],
)
def test_a_checkpoints_tokenizer_setting_of_the_wrong_type_is_refused(
    tmp_path: Path, name: str, content: Any, message: str
) -> None:
    path = write_checkpoint(tmp_path, tiny_spec())
    if name != "tokenizer_config.json":
        (path / "tokenizer_config.json").unlink()
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (path / name).write_bytes(data)
    with pytest.raises(MistralcError, match=message):
        read_tokenizer(path)


def test_a_lone_surrogate_in_a_setting_survives_writing_and_reading(tmp_path: Path) -> None:
    settings = {"version": "v\ud800", "other": "é"}
    write_json(tmp_path / "settings.json", settings)
    assert json.loads((tmp_path / "settings.json").read_text(encoding="utf-8")) == settings


def test_a_tekken_file_with_a_billion_reserved_tokens_is_refused_at_once(tmp_path: Path) -> None:
    config = {"pattern": "x", "version": "v7", "default_vocab_size": 2**40,
              "default_num_special_tokens": 10**9}  # fmt: skip
    path = tmp_path / "tekken.json"
    path.write_text(json.dumps({"config": config, "vocab": []}), encoding="utf-8")
    with pytest.raises(MistralcError, match="1,000,000,000 special tokens"):
        read_tekken(path)
    path.write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(MistralcError, match="cannot be read as a tekken"):
        read_tekken(path)


def test_a_token_of_a_megabyte_is_split_only_where_pieces_meet() -> None:
    ranks = {b"a": 0, b"b": 1, b"ab": 2, b"ab" * 2**20: 3}
    found: list[tuple[bytes, bytes]] = []
    # two million splits that copy 2 MB each would take an hour
    assert outcome_of(lambda: found.extend(merges_from_ranks(ranks)), 2**21) == "read"
    assert found == [(b"a", b"b")]


@pytest.mark.parametrize("column", ["tokens", "scores", "token_type", "model", "bos_token_id"])
@pytest.mark.parametrize("value", [5, "x", ["x"], [0.5]])
def test_a_gguf_vocabulary_with_a_column_of_the_wrong_type_is_refused(
    tmp_path: Path, column: str, value: Any
) -> None:
    good = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["<unk>", "a"],
            "tokenizer.ggml.scores": [0.0, 0.0], "tokenizer.ggml.token_type": [2, 1],
            "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 1}  # fmt: skip
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes(good | {f"tokenizer.ggml.{column}": value}))
    with pytest.raises(MistralcError):
        read_tokenizer(path)


@pytest.mark.parametrize("end", [-1, -7, 3, 2**40])
def test_an_end_of_a_gguf_file_that_is_no_token_is_left_out(tmp_path: Path, end: int) -> None:
    values = {"model": "llama", "tokens": ["<unk>", "a", "b"], "scores": [0.0, -1.0, -2.0],
              "token_type": [2, 1, 1], "eot_token_id": end}  # fmt: skip
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes({f"tokenizer.ggml.{key}": one for key, one in values.items()}))
    assert convert_file(path).generation_config == {"eos_token_id": [2]}  # llama.cpp's default


def test_a_panic_in_the_tokenizers_package_becomes_a_mistralc_error(tmp_path: Path) -> None:
    proto = sentencepiece_model()
    first = proto.pieces[0]
    first.piece, first.type = "\u2581\u2581", 4  # user-defined, spaces only
    proto.normalizer_spec.remove_extra_whitespaces = True
    path = tmp_path / "tokenizer.model.v3"
    path.write_bytes(proto.SerializeToString())
    tokenizer = convert_file(path).open()
    with pytest.raises(MistralcError, match="fails on the text"):
        tokenizer.encode(" a")


def test_a_damaged_layer_of_a_stopped_calibration_is_refused_with_what_to_delete(
    tmp_path: Path,
) -> None:
    work = WorkDirectory(directory=tmp_path)
    work.finish(0, LayerResult(tensors={"x": torch.ones(3)}, facts={}), {})
    (file,) = tmp_path.glob("layer-*")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(MistralcError, match="Delete"):
        work.layer(0)


BOMBS = (
    "{{ 'a' * 10**10 }}", "{{ 10 ** 10 ** 10 }}", "{{ [0] * 10**10 }}", "{{ '%9999999999d' % 1 }}",
    "{{ '%*d' % (9999999999, 1) }}", "{{ '{:9999999999}'.format(1) }}",
    "{{ 'x' | center(10**10) }}", "{{ 'x'.ljust(10**10) }}", "{{ '%9999999999d' | format(1) }}",
    "{{ messages | tojson(indent=10**10) }}", "{{ lipsum(10**5) }}",
    "{% for i in range(100000) %}{{ 'x' * 1000 }}{% endfor %}",
    "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% for i in range(10**9) %}{% endfor %}",
)  # fmt: skip
ESCAPES = (
    "{% include '/etc/passwd' %}", "{{ ''.__class__.__mro__ }}", "{% import 'os' as os %}",
    "{{ messages.__init__.__globals__ }}", "{{ messages.append(1) }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}", "{{ ('x' | attr('__class__')).__mro__ }}",
)  # fmt: skip


@pytest.mark.parametrize("source", [*BOMBS, *ESCAPES])
def test_a_template_that_does_more_than_render_text_is_refused(source: str) -> None:
    def run() -> None:
        template = ChatTemplate(source, control_tokens=["<s>"], variables={})
        template.render([{"role": "user", "content": "x"}], add_generation_prompt=True)

    assert outcome_of(run, 100) == "refused"


def test_an_error_message_is_one_short_paragraph_whatever_it_quotes() -> None:
    message = str(
        MistralcError("The tensor a\n\x1b[2Jb" + "x" * 5000 + " is not good. Fetch it again.")
    )
    assert "\n" not in message
    assert "\x1b" not in message
    assert len(message) < 1500
    assert message.endswith("Fetch it again.")
