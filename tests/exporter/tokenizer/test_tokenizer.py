"""Converted tokenizers against the libraries they come from, and what is refused."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
import regex
import sentencepiece
import tokenizers
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from sentencepiece import sentencepiece_model_pb2

from exporter.checkpoint.gguf_file import read_gguf
from exporter.tokenizer.bpe import merges_from_ranks
from exporter.tokenizer.read import convert_file, read_tokenizer, require_rows
from graphs.errors import MistralcError
from runtime.text.tokenizer import Tokenizer
from tests.support.strings import COUNT, texts
from tests.support.vocabularies import (
    SENTENCEPIECE,
    SMOLLM2,
    TEKKEN,
    files,
    open_files,
    opened,
    transformers_smollm2,
)

Encode = Callable[[str], list[int]]


def assert_same_ids(ours: Tokenizer, reference: Encode, over: Iterable[str]) -> None:
    for text in over:
        assert ours.encode(text, add_bos=False) == reference(text), repr(text)


def test_there_are_two_thousand_different_kinds_of_text() -> None:
    assert len(texts()) == COUNT
    assert len(set(texts())) > 0.95 * COUNT  # short random texts may repeat


@pytest.mark.parametrize("version", SENTENCEPIECE)
def test_ids_equal_sentencepiece_on_two_thousand_texts(version: str) -> None:
    path = SENTENCEPIECE[version]
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert_same_ids(opened(path), reference.encode, texts())


@pytest.mark.parametrize("name", TEKKEN)
def test_ids_equal_tekken_on_two_thousand_texts(name: str) -> None:
    path = TEKKEN[name]
    reference = Tekkenizer.from_file(path)
    assert_same_ids(opened(path), lambda text: reference.encode(text, False, False), texts())


@pytest.mark.parametrize("path", [*SENTENCEPIECE.values(), *TEKKEN.values()], ids=str)
def test_text_survives_encoding_and_decoding(path: Path) -> None:
    tokenizer = opened(path)
    for text in texts():
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", _spelled(tokenizer))


def _spelled(tokenizer: Tokenizer) -> str:
    """How `▁` is decoded: SentencePiece does not distinguish it from a space, tekken does."""
    return "▁" if tokenizer.vocab_size > 100_000 else " "


@pytest.mark.parametrize("text", ["[REF]", "[REFERENCE_DOC_3]"])
def test_only_a_single_user_defined_piece_lacks_its_leading_space(text: str) -> None:
    path = SENTENCEPIECE["v7"]
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path)).encode(text)
    assert reference[1:] == opened(path).encode(text, add_bos=False)


def test_the_first_id_is_the_bos_if_the_checkpoint_asks_for_one() -> None:
    mistral, smollm2 = opened(SENTENCEPIECE["v3"]), opened(SMOLLM2)
    assert mistral.encode("a")[0] == mistral.bos_id == 1
    assert mistral.encode("a")[1:] == mistral.encode("a", add_bos=False)
    assert smollm2.encode("a") == smollm2.encode("a", add_bos=False)


@pytest.mark.parametrize("name", ["v1", "v7", "240911", "smollm2"])
def test_no_text_becomes_a_control_token(name: str) -> None:
    path = {**SENTENCEPIECE, **TEKKEN, "smollm2": SMOLLM2}[name]
    tokenizer = opened(path)
    backend = tokenizers.Tokenizer.from_str(files(path).tokenizer_json)
    added = backend.get_added_tokens_decoder()
    special = {i for i, token in added.items() if token.special}
    for i in special:
        content = added[i].content
        for text in (content, f"x{content}", f"{content} {content}", f" {content}"):
            assert not special & set(tokenizer.encode(text, add_bos=False)), text


def test_a_stop_token_is_never_text_even_if_the_file_does_not_mark_it_special() -> None:
    converted = files(SMOLLM2)
    document = json.loads(converted.tokenizer_json)
    for token in document["added_tokens"]:
        token["special"] = False
    backend = tokenizers.Tokenizer.from_str(json.dumps(document))
    tokenizer = Tokenizer(backend, converted.tokenizer_config, converted.generation_config)
    assert tokenizer.stop_ids == {0, 2, 4}  # llama.cpp's: <|endoftext|>, <|im_end|>, <reponame>
    assert not {1, 2} & set(tokenizer.encode("a<|im_end|><|im_start|>b"))
    assert tokenizer.decode([2]) == ""
    chat = tokenizer.encode_chat([{"role": "user", "content": "<|im_end|>"}])
    assert chat == opened(SMOLLM2).encode_chat([{"role": "user", "content": "<|im_end|>"}])


def test_merges_are_every_split_of_a_piece_in_the_order_of_the_pieces() -> None:
    ranks = {"ab": 0, "abc": 1, "a": 9, "b": 8, "c": 7, "bc": 6, "aa": 2, "aaa": 3}
    assert merges_from_ranks(ranks) == [
        ("a", "b"), ("ab", "c"), ("a", "bc"), ("a", "a"), ("aa", "a"), ("a", "aa"), ("b", "c")
    ]  # fmt: skip


# GGUF


def test_smollm2_ids_equal_byte_pair_merging_by_hand_after_its_splitting_rules() -> None:
    assert_same_ids(opened(SMOLLM2), _byte_pairs_by_hand(SMOLLM2), texts())


def _byte_pairs_by_hand(path: Path) -> Encode:
    """llama.cpp's rules for `smollm`: every digit alone, then GPT-2's expression, then merges.

    A few bytes that only unassigned characters have are not in the vocabulary and drop out.
    """
    metadata = read_gguf(path).metadata
    ids = {text: i for i, text in enumerate(metadata["tokenizer.ggml.tokens"])}
    ranks = {tuple(m.split(" ")): r for r, m in enumerate(metadata["tokenizer.ggml.merges"])}
    words = regex.compile(
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    )
    kept = {*range(33, 127), *range(161, 173), *range(174, 256)}
    letters, spare = {}, 256
    for byte in range(256):
        letters[byte] = chr(byte if byte in kept else spare)
        spare += byte not in kept

    def merge(word: str) -> list[int]:
        pieces = [letters[byte] for byte in word.encode() if letters[byte] in ids]
        while True:
            pairs = [(ranks.get(pair, len(ranks)), i) for i, pair in enumerate(_pairs(pieces))]
            rank, i = min(pairs, default=(len(ranks), 0))
            if rank == len(ranks):
                return [ids[piece] for piece in pieces]
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]

    def encode(text: str) -> list[int]:
        parts = [part for part in regex.split(r"(\p{N})", text) if part]
        return [i for part in parts for word in words.findall(part) for i in merge(word)]

    return encode


def _pairs(pieces: list[str]) -> list[tuple[str, str]]:
    return list(pairwise(pieces))


def test_smollm2_ids_equal_transformers_reading_of_the_same_gguf() -> None:
    # transformers does not split digits from what precedes them, which shows after spaces.
    alike = [text for text in texts() if not regex.search(r"\s\p{N}", text)]
    assert len(alike) > 0.8 * COUNT
    document = transformers_smollm2().backend_tokenizer.to_str()
    backend = tokenizers.Tokenizer.from_str(document)
    backend.encode_special_tokens = True
    assert_same_ids(
        opened(SMOLLM2), lambda text: backend.encode(text, add_special_tokens=False).ids, alike
    )


def test_a_llama_kind_of_gguf_has_the_ids_of_its_sentencepiece_model(tmp_path: Path) -> None:
    path = tmp_path / "mistral"  # recognized by its first bytes
    _write_gguf(path, SENTENCEPIECE["v3"])
    reference = sentencepiece.SentencePieceProcessor(model_file=str(SENTENCEPIECE["v3"]))
    converted = convert_file(path)
    # llama.cpp puts a space before the word after a user-defined piece; SentencePiece does not.
    alike = [text for text in texts()[:500] if "[REFERENCE_DOC" not in text]
    assert_same_ids(open_files(converted), reference.encode, alike)
    assert converted.tokenizer_config["add_bos_token"] is True
    assert converted.tokenizer_config["chat_template"] is None


def _write_gguf(path: Path, model: Path, kind: str = "llama") -> None:
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.read_bytes())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list([piece.piece for piece in proto.pieces])
    writer.add_token_scores([piece.score for piece in proto.pieces])
    writer.add_token_types([piece.type for piece in proto.pieces])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


# Other SentencePiece models


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    lines = (text.replace("\n", " ").replace("\0", "") for text in texts())
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("squeeze", [True, False])
@pytest.mark.parametrize("marks", [[], ["[REF]", "[/REF]"]])
def test_the_flags_of_a_sentencepiece_normalizer_are_honoured(
    corpus: Path, tmp_path: Path, prefix: bool, squeeze: bool, marks: list[str]
) -> None:
    path = _train(
        corpus, tmp_path, add_dummy_prefix=prefix, remove_extra_whitespaces=squeeze,
        user_defined_symbols=marks,
    )  # fmt: skip
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = open_files(convert_file(path))
    assert_same_ids(ours, reference.encode, texts()[:700])


def _train(corpus: Path, folder: Path, **options: Any) -> Path:
    settings = {"model_type": "bpe", "normalization_rule_name": "identity", **options}
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "tokenizer"), vocab_size=900,
        character_coverage=0.98, byte_fallback=True, minloglevel=2, **settings,
    )  # fmt: skip
    return folder / "tokenizer.model"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"model_type": "unigram"}, "other than BPE"),
        ({"treat_whitespace_as_suffix": True}, "whitespace as suffix"),
        ({"normalization_rule_name": "nfkc"}, "the normalizer 'nfkc'"),
    ],
)
def test_a_sentencepiece_model_of_another_kind_is_refused(
    corpus: Path, tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(MistralcError, match=named):
        convert_file(_train(corpus, tmp_path, **options))


# Directories


def test_a_hugging_face_tokenizer_passes_through_byte_for_byte(tmp_path: Path) -> None:
    text = json.dumps(json.loads(files(SMOLLM2).tokenizer_json), indent=1) + "\n\n"
    (tmp_path / "tokenizer.json").write_bytes(text.encode())
    shutil.copy(SENTENCEPIECE["v3"], tmp_path / "tokenizer.model.v3")  # tokenizer.json comes first
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({
            "bos_token": {"content": "<|im_start|>", "lstrip": False}, "eos_token": "<|im_end|>",
            "chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}],
            "model_max_length": 8192,
        })
    )  # fmt: skip
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [0, 2], "temperature": 0.2, "top_p": 0.9, "_from": "x"})
    )
    converted = read_tokenizer(tmp_path)
    assert converted.tokenizer_json.encode() == (tmp_path / "tokenizer.json").read_bytes()
    assert converted.generation_config == {
        "eos_token_id": [0, 2], "temperature": 0.2, "top_p": 0.9, "do_sample": False
    }  # fmt: skip
    config = converted.tokenizer_config
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert config["add_bos_token"] is False  # its post-processor adds none
    assert config["chat_template"] == "{{ messages[0].content }}"


def test_settings_next_to_the_tokenizer_are_read(tmp_path: Path) -> None:
    shutil.copy(SENTENCEPIECE["v3"], tmp_path / "tokenizer.model")
    (tmp_path / "config.json").write_text('{"eos_token_id": 2, "bos_token_id": 1}')
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}[INST]hi[/INST]")
    converted = read_tokenizer(tmp_path)
    assert converted.tokenizer_config["tokenizer_version"] == "v3"  # recognized by its pieces
    assert converted.tokenizer_config["chat_template"] == "{{ bos_token }}[INST]hi[/INST]"
    assert converted.generation_config == {"eos_token_id": [2]}


def test_the_newest_of_mistrals_own_files_is_taken(tmp_path: Path) -> None:
    shutil.copy(SENTENCEPIECE["v1"], tmp_path / "tokenizer.model")
    shutil.copy(SENTENCEPIECE["v7"], tmp_path / "tokenizer.model.v7m1")
    assert read_tokenizer(tmp_path).tokenizer_config["tokenizer_version"] == "v7"


def test_the_end_of_a_turn_stops_even_if_only_the_end_of_a_document_is_named(
    tmp_path: Path,
) -> None:
    converted = files(SMOLLM2)
    (tmp_path / "tokenizer.json").write_text(converted.tokenizer_json)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|endoftext|>", "chat_template": "a<|im_end|>"})
    )
    assert read_tokenizer(tmp_path).generation_config == {"eos_token_id": [0, 2]}


def test_a_written_tokenizer_loads_unchanged(tmp_path: Path) -> None:
    converted = files(SENTENCEPIECE["v3"])
    (tmp_path / "tokenizer.json").write_text(converted.tokenizer_json, encoding="utf-8")
    for name in ("tokenizer_config", "generation_config"):
        (tmp_path / f"{name}.json").write_text(json.dumps(getattr(converted, name)))
    loaded, expected = Tokenizer.load(tmp_path), opened(SENTENCEPIECE["v3"])
    assert loaded.encode("Hello, world") == expected.encode("Hello, world")
    assert (loaded.stop_ids, loaded.bos_id, loaded.vocab_size) == ({2}, 1, 32768)


# Errors


def test_a_directory_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MistralcError, match=r"has no tokenizer; expected tokenizer\.json"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b'{"version": "1.0", "model"', "cannot be read as a tokenizer"),
        ("tokenizer.json", b"\xff\xfe", "cannot be read"),
        ("tekken.json", b'{"config": {}}', "cannot be read as a tekken tokenizer"),
        ("tekken.json", b"[", "cannot be read as a tekken tokenizer"),
        ("tokenizer.model.v3", b"version https://git-lfs", "cannot be read as a SentencePiece"),
        ("tokenizer.model.v3", b"", "has no pieces"),
        ("model.gguf", b"GGUF" + bytes(20), "model.gguf"),
        ("vocab.txt", b"a", "does not have the name of a tokenizer file"),
    ],
)
def test_a_damaged_file_is_one_clear_paragraph(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MistralcError, match=message) as raised:
        convert_file(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_a_tekken_file_with_fewer_tokens_than_it_promises_is_an_error(tmp_path: Path) -> None:
    content = json.loads(TEKKEN["240911"].read_bytes())
    content["vocab"] = content["vocab"][:500]
    (tmp_path / "tekken.json").write_text(json.dumps(content))
    with pytest.raises(MistralcError, match="500 tokens where its configuration asks for 130072"):
        convert_file(tmp_path / "tekken.json")


def test_a_gguf_with_another_kind_of_tokenizer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    _write_gguf(path, SENTENCEPIECE["v1"], kind="t5")
    with pytest.raises(MistralcError, match="of the kind 't5'"):
        convert_file(path)
    _write_gguf(path, SENTENCEPIECE["v1"], kind="gpt2")
    with pytest.raises(MistralcError, match=r"incomplete or damaged \(KeyError: 'ggml.merges'\)"):
        convert_file(path)


def test_settings_that_name_a_token_without_a_row_in_the_embedding_are_an_error(
    tmp_path: Path,
) -> None:
    shutil.copy(SENTENCEPIECE["v1"], tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    converted = read_tokenizer(tmp_path)
    assert converted.tokenizer_config["eos_token_id"] == 32000  # as transformers adds it
    with pytest.raises(MistralcError, match=r"'<\|im_end\|>' has the id 32000.* 32,000 rows"):
        require_rows(converted, 32_000)
    assert require_rows(converted, 32_001) == ()
    assert require_rows(converted, 32_064) == (
        "the embedding has 63 more rows than there are tokens (padding)",
    )
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "two"}')
    with pytest.raises(MistralcError, match="`eos_token_id`"):
        read_tokenizer(tmp_path)


def test_an_unpaired_surrogate_is_an_error() -> None:
    with pytest.raises(MistralcError, match="surrogate"):
        opened(SENTENCEPIECE["v1"]).encode("a\ud83e")


def test_a_bundle_without_its_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MistralcError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(tmp_path)
    for name in ("tokenizer", "tokenizer_config", "generation_config"):
        (tmp_path / f"{name}.json").write_text("{")
    with pytest.raises(MistralcError, match="cannot be read as a tokenizer"):
        Tokenizer.load(tmp_path)


def test_the_runtime_tokenizer_imports_no_build_tools() -> None:
    code = (
        "import sys, runtime.text.tokenizer, runtime.text.chat_template; "
        "print([m for m in ('torch', 'onnx', 'onnx_ir', 'transformers', 'sentencepiece') "
        "if m in sys.modules])"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
