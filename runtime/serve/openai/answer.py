"""Collect the text and log-probabilities of one choice. Knows nothing about HTTP or the scheduler.

The log-probabilities of a token are held back until its text begins to be sent. Those of a stop
string are never sent.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from runtime.decoding.sampling import Sampled
from runtime.text.text_stream import TextStream
from runtime.text.tokenizer import Tokenizer


class Scored(NamedTuple):
    """A token with its log-probability, and its offset in the choice's text, in characters."""

    offset: int
    sampled: Sampled


class Piece(NamedTuple):
    """Text to send, possibly empty, and the tokens that it begins."""

    text: str
    scored: tuple[Scored, ...]


class Answer:
    """The text of one choice as it grows.

    `chat` drops the space that SentencePiece puts before the first word (see `Completion`).
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str], *, chat: bool, logprobs: bool
    ) -> None:
        self.count = 0  # sampled tokens, the end-of-text token included
        self._stop_ids, self._bytes_of = tokenizer.stop_ids, tokenizer.bytes_of
        self._stream = TextStream(tokenizer, stops, continuation=not chat)
        self._logprobs = logprobs
        self._sent = 0  # characters returned so far
        self._pending: deque[Scored] = deque()  # tokens whose text was not returned yet

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the text."""
        return self._stream.stopped

    def push(self, sampled: Sampled) -> Piece:
        """Take the next token; return what can be sent now: nothing after a stop string."""
        if self.stopped:
            return Piece("", ())
        self.count += 1
        before = self._stream.decoded
        text = self._stream.push(sampled.token_id)
        if self._logprobs and sampled.token_id not in self._stop_ids:
            spelled = self._bytes_of(sampled.token_id).decode("utf-8", errors="replace")
            # Decoded characters beyond the token's own are U+FFFD for broken bytes before it.
            offset = max(before, self._stream.decoded - len(spelled))
            self._pending.append(Scored(offset, sampled))
        return self._piece(text)

    def finish(self) -> Piece:
        """Return what was held back, once no token follows."""
        if self.stopped:
            return Piece("", ())
        piece = self._piece(self._stream.finish())
        return piece if self.stopped else Piece(piece.text, (*piece.scored, *self._pending))

    def _piece(self, text: str) -> Piece:
        self._sent += len(text)
        scored = []
        while self._pending and self._pending[0].offset < self._sent:
            scored.append(self._pending.popleft())
        return Piece(text, tuple(scored))
