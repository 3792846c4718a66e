"""Tokens of one choice to text and log-probabilities. Knows nothing about HTTP or the scheduler.

Text that may become a stop string, or half a character, is held back; so are the log-probabilities
of its tokens, until their text begins to be sent. Those of a stop string are never sent.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from runtime.decoding.sampling import Sampled
from runtime.text.stop_strings import StopStrings
from runtime.text.tokenizer import Tokenizer


class Scored(NamedTuple):
    """A token with its log-probability, and where in the choice's text it begins, in characters."""

    offset: int
    sampled: Sampled


class Piece(NamedTuple):
    """Text that is certain, possibly empty, and the tokens that it is made of."""

    text: str
    scored: tuple[Scored, ...]


class Answer:
    """One choice as it grows.

    `chat` drops the space that SentencePiece puts before the first word (see `Completion`).
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str], *, chat: bool, logprobs: bool
    ) -> None:
        self.count = 0  # tokens sampled, the end-of-text token among them
        self.stopped = False  # a stop string was met
        self._stop_ids, self._bytes_of = tokenizer.stop_ids, tokenizer.bytes_of
        self._decoder = tokenizer.stream(continuation=not chat)
        self._stops = StopStrings(stops)
        self._logprobs = logprobs
        self._read = 0  # characters that tokens stood for
        self._sent = 0  # characters that were given out
        self._waiting: deque[Scored] = deque()

    def push(self, sampled: Sampled) -> Piece:
        """Take the next token; return the text that it makes certain. Nothing after a stop."""
        if self.stopped:
            return Piece("", ())
        self.count += 1
        text, before = self._decoder.push(sampled.token_id), self._read
        self._read += len(text)
        if self._logprobs and sampled.token_id not in self._stop_ids:
            own = self._bytes_of(sampled.token_id).decode("utf-8", errors="replace")
            # What the token does not spell itself is what broken bytes before it became.
            self._waiting.append(Scored(max(before, self._read - len(own)), sampled))
        certain, self.stopped = self._stops.push(text)
        return self._given(certain)

    def finish(self) -> Piece:
        """What was held back, once no token follows."""
        if self.stopped:
            return Piece("", ())
        text = self._stops.push(self._decoder.flush()).text + self._stops.flush()
        self.stopped = self._stops.matched is not None
        piece = self._given(text)
        return piece if self.stopped else Piece(text, (*piece.scored, *self._waiting))

    def _given(self, text: str) -> Piece:
        self._sent += len(text)
        scored = []
        while self._waiting and self._waiting[0].offset < self._sent:
            scored.append(self._waiting.popleft())
        return Piece(text, tuple(scored))
