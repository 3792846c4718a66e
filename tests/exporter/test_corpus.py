"""Text as token ids: where it comes from, how it is cut, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.checks.corpus import Corpus, read_corpus, windows
from exporter.tokenizer.read import TokenizerFiles, read_tokenizer
from graphs.errors import MistralcError, UsageError
from runtime.text.tokenizer import Tokenizer

BOS = 1  # of the tiny vocabulary, in which every byte is a token


@pytest.fixture(scope="module")
def files(plain_checkpoint: Path) -> TokenizerFiles:
    return read_tokenizer(plain_checkpoint)


@pytest.fixture(scope="module")
def tokenizer(files: TokenizerFiles) -> Tokenizer:
    return files.open()


def without(files: TokenizerFiles, **settings: Any) -> Tokenizer:
    return replace(files, tokenizer_config=files.tokenizer_config | settings).open()


def corpus_of(*lengths: int) -> Corpus:
    """Documents of these lengths whose tokens are numbered through."""
    ends = np.cumsum(lengths)
    return Corpus(
        documents=tuple(np.arange(end - n, end) for n, end in zip(lengths, ends, strict=True)),
        source="numbers",
    )


def ids_of(corpus: Corpus) -> list[list[int]]:
    return [document.tolist() for document in corpus.documents]


# What is read


def test_without_a_file_odd_topics_of_pythons_documentation_evaluate_and_even_ones_calibrate(
    tokenizer: Tokenizer,
):
    from pydoc_data.topics import topics

    names = sorted(topics)
    for part, begin in (("calibration", 0), ("evaluation", 1)):
        corpus = read_corpus([], tokenizer, part)
        assert ids_of(corpus) == [tokenizer.encode(topics[name]) for name in names[begin::2]]
        assert "default" in corpus.source
        assert part in corpus.source


def test_every_document_begins_with_the_bos_that_the_checkpoint_asks_for(
    files: TokenizerFiles, tokenizer: Tokenizer
):
    assert all(ids[0] == BOS for ids in read_corpus([], tokenizer, "evaluation").documents)
    plain = read_corpus([], without(files, add_bos_token=False), "evaluation")
    assert not any(BOS in ids for ids in plain.documents)


def test_a_text_file_is_one_document_with_its_line_breaks_and_without_its_byte_order_mark(
    tokenizer: Tokenizer, tmp_path: Path
):
    text = "one\r\n\n  zwei\t日本\n"
    for name, mark in (("a.txt", b""), ("b", b"\xef\xbb\xbf")):
        (tmp_path / name).write_bytes(mark + text.encode())
    corpus = read_corpus([tmp_path / "a.txt", tmp_path / "b"], tokenizer, "evaluation")
    assert ids_of(corpus) == 2 * [tokenizer.encode(text)]
    assert corpus.documents[0].dtype == np.int64
    assert corpus.source == "a.txt, b"


def test_each_line_of_a_jsonl_file_is_a_document_of_text_or_of_messages(
    tokenizer: Tokenizer, tmp_path: Path
):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<s> there"}]
    lines = [{"text": "first\nline"}, {"messages": chat, "text": "ignored"}, {"text": ""}]
    file = tmp_path / "data.JSONL"
    file.write_text("\n\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    corpus = read_corpus([file], tokenizer, "calibration")
    assert ids_of(corpus) == [
        tokenizer.encode("first\nline"),
        tokenizer.encode_chat(chat, add_generation_prompt=False),
    ]
    assert ids_of(corpus)[1].count(BOS) == 1, "a message has written a control token"


def test_the_fingerprint_is_of_the_ids_and_their_documents_and_of_nothing_else():
    corpus = corpus_of(3, 4)
    assert len(corpus.fingerprint) == 64
    assert replace(corpus, source="renamed").fingerprint == corpus.fingerprint
    wide = tuple(ids.astype(">i8") for ids in corpus.documents)
    assert replace(corpus, documents=wide).fingerprint == corpus.fingerprint
    others = [corpus_of(4, 3), corpus_of(7), corpus_of(3, 4, 1)]
    assert len({c.fingerprint for c in [corpus, *others]}) == 4


# What is refused


BAD = {
    "no UTF-8": ("a.txt", b"good \xff\xfe", "not UTF-8 (byte 5 is 0xff)"),
    "UTF-16": ("a.txt", "text".encode("utf-16"), "not UTF-8"),
    "a NUL": ("a.txt", b"x" * 5000 + b"\0", "the first of them U+0000 at character 5,000"),
    "control characters": ("a.txt", b"\x01\x02text\x7f", "3 control characters among 7"),
    "nothing": ("a.txt", b"", "is empty"),
    "no line": ("a.jsonl", b"\n \n", "is empty"),
    "only empty lines of text": ("a.jsonl", b'{"text": ""}\n', "is empty"),
    "broken JSON": ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl, line 2 is not JSON"),
    "plain text": ("a.jsonl", b"Once upon a time", "line 1 is not JSON"),
    "deep JSON": ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
    "no object": ("a.jsonl", b'["text"]', "line 1 is a JSON list; expected an object"),
    "no text": ("a.jsonl", b'\n{"prompt": "a", "id": 3}', "line 2: The fields are prompt, id;"),
    "no field": ("a.jsonl", b"{}", "line 1: The fields are none at all"),
    "text of another type": ("a.jsonl", b'{"text": 3}', "line 1: The fields are text"),
    "binary in JSON": ("a.jsonl", b'{"text": "\\u0000"}', "line 1: The text holds 1 control"),
    "binary in a chat": (
        "a.jsonl", b'{"messages": [{"role": "user", "content": "\\u0001"}]}',
        "line 1: A message holds 1 control",
    ),
    "half a surrogate pair": ("a.jsonl", b'{"text": "\\ud800"}', "line 1: The text "),
    "messages of another type": ("a.jsonl", b'{"messages": "hi"}', 'line 1: `messages` is "hi"'),
    "no message": ("a.jsonl", b'{"messages": []}', "line 1: `messages` is []"),
    "messages of text": ("a.jsonl", b'{"messages": ["hi"]}', "expected a non-empty list of"),
    "a message without a role": (
        "a.jsonl", b'{"messages": [{"content": "hi"}]}', "line 1: A message's role is None",
    ),
    "a message without content": (
        "a.jsonl", b'{"messages": [{"role": "user"}]}', "line 1: The chat template fails",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_text_is_refused_by_file_and_line(
    case: str, tokenizer: Tokenizer, tmp_path: Path
):
    name, content, expected = BAD[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MistralcError) as refused:
        read_corpus([tmp_path / name], tokenizer, "evaluation")
    message = str(refused.value)
    assert expected in message
    assert message.startswith(str(tmp_path / name))
    assert "expected" in message


def test_a_file_that_cannot_be_read_is_named(tokenizer: Tokenizer, tmp_path: Path):
    for path in (tmp_path / "nothing.txt", tmp_path):
        with pytest.raises(MistralcError, match=f"{path} could not be read .* Check the path"):
            read_corpus([path], tokenizer, "evaluation")


def test_a_stray_control_character_in_much_text_is_text(tokenizer: Tokenizer, tmp_path: Path):
    text = "\x1b" + "a" * 2000
    (tmp_path / "log.txt").write_text(text, encoding="utf-8")
    corpus = read_corpus([tmp_path / "log.txt"], tokenizer, "evaluation")
    assert ids_of(corpus) == [tokenizer.encode(text)]


def test_a_chat_needs_a_template(files: TokenizerFiles, tmp_path: Path):
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(chat), encoding="utf-8")
    with pytest.raises(MistralcError, match=r"chat.jsonl, line 1: The bundle has no chat template"):
        read_corpus([tmp_path / "chat.jsonl"], without(files, chat_template=None), "calibration")


# Windows


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(2, 15), st.integers(1, 9))
def test_windows_are_the_documents_end_to_end_without_the_rest(
    lengths: list[int], length: int, limit: int
):
    corpus, total = corpus_of(*lengths), sum(lengths)
    if total < length:
        with pytest.raises(UsageError, match="at least one window"):
            windows(corpus, length)
        return
    whole = windows(corpus, length)
    assert whole.shape == (total // length, length)
    assert whole.ravel().tolist() == list(range(whole.size))
    assert windows(corpus, length, limit).tolist() == whole[:limit].tolist()


def test_too_little_text_and_windows_that_mean_nothing_are_refused():
    with pytest.raises(UsageError, match=r"\(numbers\) is 7 tokens .* window of 8\. .*--length"):
        windows(corpus_of(3, 4), 8)
    with pytest.raises(UsageError, match="expected at least 2"):
        windows(corpus_of(3, 4), 1)
    with pytest.raises(UsageError, match="0 windows were asked for"):
        windows(corpus_of(3, 4), 2, 0)
