"""TextStream: pieces joined are the text up to its stop string, and nothing is sent early."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from graphs.errors import UsageError
from runtime.text.stop_strings import StopStrings
from runtime.text.text_stream import TextStream
from runtime.text.tokenizer import Tokenizer

STOPS = st.lists(st.text("abc �", min_size=1), max_size=3)


@pytest.fixture(scope="module")
def tokenizer(plain_bundle: Path) -> Tokenizer:
    return Tokenizer.load(plain_bundle)


def ids_of(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """One token for each byte."""
    ids = {tokenizer.bytes_of(i): i for i in range(tokenizer.vocab_size)}
    return [ids[bytes([byte])] for byte in data]


def pieces(stream: TextStream, ids: list[int]) -> list[str]:
    return [*(stream.push(i) for i in ids), stream.finish()]


@given(
    data=st.one_of(st.binary(max_size=30), st.text("abc �é").map(str.encode)),
    stops=STOPS,
    continuation=st.booleans(),
)
@example(data=b"\xe2", stops=["�"], continuation=False)
def test_pieces_joined_are_the_decoded_text_up_to_the_stop_string(
    tokenizer: Tokenizer, data: bytes, stops: list[str], continuation: bool
) -> None:
    ids = ids_of(tokenizer, data)
    stream = TextStream(tokenizer, stops, continuation=continuation)
    text = "".join(pieces(stream, ids))
    search = StopStrings(stops)
    decoded = tokenizer.decode(ids, continuation=continuation)
    assert text == search.push(decoded).text + search.flush()
    assert stream.stopped_by == search.matched
    assert stream.stopped is (search.matched is not None)


def test_what_may_become_a_stop_string_is_held_back_until_it_does_not(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["<end>"], continuation=True)
    assert [stream.push(i) for i in ids_of(tokenizer, b"a<em")] == ["a", "", "", "<em"]
    assert stream.decoded == len("a<em")
    assert [stream.push(i) for i in ids_of(tokenizer, b"<e")] == ["", ""]
    assert stream.decoded == len("a<em<e"), "text that is held back counts"
    assert stream.finish() == "<e"
    assert stream.stopped_by is None


def test_after_a_stop_string_every_piece_is_empty(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["b", "cd"], continuation=True)
    assert pieces(stream, ids_of(tokenizer, b"acdxy")) == ["a", "", "", "", "", ""]
    assert stream.stopped
    assert stream.stopped_by == "cd"


def test_no_part_of_a_character_is_sent(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, [], continuation=True)
    assert pieces(stream, ids_of(tokenizer, "é".encode())) == ["", "é", ""]
    cut = TextStream(tokenizer, [], continuation=True)
    assert pieces(cut, ids_of(tokenizer, "é".encode()[:1])) == ["", "�"]


def test_an_unfinished_character_can_complete_a_stop_string(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["a�"], continuation=True)
    assert pieces(stream, ids_of(tokenizer, b"xa\xe2")) == ["x", "", "", ""]
    assert stream.stopped_by == "a�"


def test_an_empty_stop_string_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="stop string is empty"):
        TextStream(tokenizer, ["a", ""], continuation=True)
