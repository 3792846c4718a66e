r"""Turn sampled tokens into text that is safe to send, up to the first stop string.

Two things are held back: the bytes of an unfinished character, and text that may become a stop
string. With the stop string "<end>" and one token a character:

    push("H") -> "H"    push("<") -> ""    push("e") -> ""    finish() -> "<e"
"""

from collections.abc import Sequence

from runtime.text.stop_strings import StopStrings
from runtime.text.tokenizer import Tokenizer


class TextStream:
    """Text of one growing list of token ids.

    The returned pieces, joined, are `tokenizer.decode` of all tokens, cut before the first of the
    `stops` or of the checkpoint's own stop strings. `continuation` keeps the space that
    SentencePiece puts before the first word: it belongs to text that continues a prompt, not to an
    answer in a chat. Raises UsageError if a stop string is empty.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], *, continuation: bool) -> None:
        self.decoded = 0  # characters decoded so far, those held back included
        self._decoder = tokenizer.stream(continuation=continuation)
        self._stops = StopStrings((*stops, *tokenizer.stop_strings))

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the text, or None."""
        return self._stops.matched

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the text. Every later piece is empty."""
        return self._stops.matched is not None

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that can be sent now, often none."""
        return self._accept(self._decoder.push(token_id))

    def finish(self) -> str:
        """Return the text still held back, once no token follows.

        An unfinished character becomes U+FFFD, which can complete a stop string.
        """
        return self._accept(self._decoder.flush()) + self._stops.flush()

    def _accept(self, text: str) -> str:
        self.decoded += len(text)
        return self._stops.push(text).text
