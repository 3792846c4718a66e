"""Decoding token by token gives the same text as decoding at once."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from graphs.errors import MistralcError
from runtime.text.tokenizer import Tokenizer
from tests.support.strings import texts
from tests.support.vocabularies import ALL, SENTENCEPIECE, TEKKEN, opened

# Ids of control tokens, of single bytes (`<0x00>` or the first of tekken's ranks), and any.
SPECIAL = st.integers(0, 20)
BYTES = st.one_of(st.integers(3, 258), st.integers(771, 1026), st.integers(1000, 1255))
IDS = st.lists(st.one_of(SPECIAL, BYTES, st.integers(0, 140_000)), max_size=40)


def streamed(tokenizer: Tokenizer, ids: list[int], *, continuation: bool = False) -> str:
    stream = tokenizer.stream(continuation=continuation)
    return "".join([*(stream.push(i) for i in ids), stream.flush()])


@pytest.mark.parametrize("name", ALL)
@given(ids=IDS, continuation=st.booleans())
@settings(max_examples=250, deadline=None)
def test_a_stream_equals_decoding_at_once(name: str, ids: list[int], continuation: bool) -> None:
    tokenizer = opened(ALL[name])
    once = tokenizer.decode(ids, continuation=continuation)
    assert streamed(tokenizer, ids, continuation=continuation) == once


@pytest.mark.parametrize("name", ALL)
def test_a_stream_round_trips_every_text(name: str) -> None:
    tokenizer = opened(ALL[name])
    for text in texts()[:600]:
        ids = tokenizer.encode(text)
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ALL)
def test_no_part_of_a_character_is_ever_returned(name: str) -> None:
    tokenizer = opened(ALL[name])
    text = "🤷🏽\u200d♀️ 𠮷 한 \U0002a6d6\U00010348é"
    stream = tokenizer.stream()
    shown = [stream.push(i) for i in tokenizer.encode(text)]
    assert "�" not in "".join(shown)
    assert "".join(shown) + stream.flush() == text


def test_an_unfinished_character_becomes_one_replacement_character() -> None:
    tokenizer = opened(SENTENCEPIECE["v1"])
    ids = tokenizer.encode("🧑🏻\u200d🚀", add_bos=False)
    stream = tokenizer.stream()
    assert [stream.push(i) for i in (ids[0], 3 + 0xF0, 3 + 0x9F)] == ["", "", ""]
    assert stream.flush() == "�"


def test_decoding_equals_sentencepieces_and_tekkens_on_valid_text() -> None:
    reference = SentencePieceProcessor(model_file=str(SENTENCEPIECE["v7"]))
    tekken = Tekkenizer.from_file(TEKKEN["240911"])
    for text in texts()[:600]:
        ids = reference.encode(text)
        assert opened(SENTENCEPIECE["v7"]).decode(ids) == reference.decode(ids)
        ids = tekken.encode(text, False, False)
        assert opened(TEKKEN["240911"]).decode(ids) == tekken.decode(ids)


def test_a_continuation_keeps_the_space_before_its_first_word() -> None:
    tokenizer = opened(SENTENCEPIECE["v3"])
    ids = tokenizer.encode("Paris is", add_bos=False)
    assert tokenizer.decode(ids) == "Paris is"
    assert tokenizer.decode(ids, continuation=True) == " Paris is"


def test_ids_without_a_token_and_control_tokens_have_no_text() -> None:
    tokenizer = opened(SENTENCEPIECE["v3"])
    assert tokenizer.decode([1, 2, 3, 4, 32768, 10**9, -1]) == ""


def test_the_millionth_token_costs_as_much_as_the_first() -> None:
    tokenizer = opened(SENTENCEPIECE["v3"])
    ids = tokenizer.encode(" ".join(texts()[:50]))
    stream = tokenizer.stream()

    def fastest_pass(passes: int) -> float:
        times = []
        for _ in range(passes):
            start = time.perf_counter()
            for i in ids:
                stream.push(i)
            times.append(time.perf_counter() - start)
        return min(times)

    early = fastest_pass(5)
    for _ in range(1_000_000 // len(ids)):
        for i in ids:
            stream.push(i)
    # Decoding everything again would take thousands of times longer; 3 leaves room for noise.
    assert fastest_pass(5) < 3 * early


def test_an_unsupported_kind_of_decoder_is_refused() -> None:
    backend = Backend(models.WordLevel({"a": 0}, "a"))
    with pytest.raises(MistralcError, match="decoder is null"):
        Tokenizer(backend, {}, {})
    backend.decoder = decoders.WordPiece()
    with pytest.raises(MistralcError, match="decoder is WordPiece"):
        Tokenizer(backend, {}, {})
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Strip(" ", 2, 0)])
    with pytest.raises(MistralcError, match="Strip"):
        Tokenizer(backend, {}, {})
