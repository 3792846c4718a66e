"""Decode token ids to text, all at once or one by one. Knows nothing about encoding or chats.

Every token stands for bytes, and the text is those bytes decoded as UTF-8. A token's bytes depend
only on its id, so the millionth token of a stream costs as much as the first.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import tokenizers

from graphs.errors import MistralcError

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"  # how SentencePiece writes a space
_NEUTRAL = {"Sequence", "Fuse"}


@lru_cache(maxsize=1)
def byte_characters() -> Mapping[int, str]:
    """Return the character that stands for each byte in a byte-level vocabulary.

    Printable Latin-1 characters stand for themselves, the other 68 bytes for the characters from
    U+0100 on, in order (Radford et al. 2019, the GPT-2 encoder).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(0x100 + i) for i, byte in enumerate(others)
    }


class Detokenizer:
    """The bytes of each token of a `tokenizers.Tokenizer`; special tokens have none.

    Raises MistralcError if the tokenizer's decoder is of a kind not supported here.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, special_ids: frozenset[int]) -> None:
        state = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else None
        steps = list(_steps(state))
        kinds = {step["type"] for step in steps}
        unknown = kinds - _NEUTRAL - {"ByteLevel", "ByteFallback", "Metaspace", "Replace", "Strip"}
        unsupported = [step for step in steps if not _is_supported(step)]
        if unknown or unsupported or not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
            got = ", ".join(sorted(unknown)) or json.dumps(unsupported or state)
            raise MistralcError(
                f"The tokenizer's decoder is {got}; a byte-level or a SentencePiece-like one "
                "(ByteLevel, or Metaspace, ByteFallback, Replace, Strip) is expected. "
                "Check the checkpoint's tokenizer.json: it is not that of a Mistral-like model."
            )
        self._tokenizer = tokenizer
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self._drops_space = any(_drops_space(step) for step in steps)
        self._special_ids = special_ids
        self._added = tokenizer.get_added_tokens_decoder()
        self._byte_of = {character: byte for byte, character in byte_characters().items()}
        self._cache: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes of one token; none for an id outside the vocabulary."""
        known = self._cache.get(token_id)
        if known is None:
            known = self._cache[token_id] = self._look_up(token_id)
        return known

    def decode(self, ids: Iterable[int], *, continuation: bool = False) -> str:
        """Return the text of `ids`; invalid UTF-8 becomes U+FFFD."""
        stream = self.stream(continuation=continuation)
        data = b"".join(map(self.bytes_of, ids))
        return stream.accept(data.decode("utf-8", errors="replace"))

    def stream(self, *, continuation: bool = False) -> "StreamDecoder":
        """Return a decoder for ids that arrive one at a time.

        `continuation` keeps the space that SentencePiece puts before the first word: it belongs
        there if the text continues another.
        """
        return StreamDecoder(self, drops_space=self._drops_space and not continuation)

    def _look_up(self, token_id: int) -> bytes:
        if token_id in self._special_ids:
            return b""
        added = self._added.get(token_id)
        if added is not None:
            return bytes(added.content, "utf-8")
        piece = self._tokenizer.id_to_token(token_id) if token_id >= 0 else None
        if piece is None:
            return b""
        if self._byte_level:
            if all(character in self._byte_of for character in piece):
                return bytes(self._byte_of[character] for character in piece)
            return piece.encode()
        match = _BYTE_PIECE.fullmatch(piece) if self._byte_fallback else None
        return bytes([int(match[1], 16)]) if match else piece.replace(_SPACE, " ").encode()


class StreamDecoder:
    """Decodes tokens as they arrive; the joined results of `push` and `flush` are `decode(ids)`."""

    def __init__(self, detokenizer: Detokenizer, *, drops_space: bool) -> None:
        self._detokenizer = detokenizer
        self._drops_space = drops_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Return the characters that this token completes; none within a multi-byte character."""
        return self.accept(self._utf8.decode(self._detokenizer.bytes_of(token_id)))

    def flush(self) -> str:
        """Return U+FFFD if the last character is unfinished, else nothing."""
        return self.accept(self._utf8.decode(b"", final=True))

    def accept(self, text: str) -> str:
        """Return `text`, without the space before the first word if that is to be dropped."""
        if text and self._drops_space:
            self._drops_space = False
            return text.removeprefix(" ")
        return text


def _steps(decoder: Any) -> Iterator[dict[str, Any]]:
    """Yield the decoder's steps, those inside sequences included."""
    if decoder is not None:
        yield decoder
        for inner in decoder.get("decoders", ()):
            yield from _steps(inner)


def _is_supported(step: Mapping[str, Any]) -> bool:
    match step:
        case {"type": "Replace", "pattern": pattern, "content": content}:
            return bool(pattern == {"String": _SPACE} and content == " ")
        case {"type": "Strip", "content": content, "start": start, "stop": stop}:
            return bool(content == " " and start <= 1 and stop == 0)
        case {"type": "Metaspace", "replacement": replacement}:
            return bool(replacement == _SPACE)
        case _:
            return True


def _drops_space(step: Mapping[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        return bool(step.get("prepend_scheme", "always") != "never")
    return bool(step["type"] == "Strip" and step["start"] == 1)
