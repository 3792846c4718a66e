"""The two APIs' answers: what each puts around text and log-probabilities. Knows no HTTP."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from runtime.serve.openai.answer import Piece, Scored
from runtime.serve.openai.schemas import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    FinishReason,
    PromptDetails,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from runtime.text.tokenizer import Tokenizer


class Finished(NamedTuple):
    """One choice, complete."""

    piece: Piece
    reason: FinishReason


class Shape(Protocol):
    """How one API writes answers. `logprobs` says whether log-probabilities were asked for."""

    def opening(self, choice: int) -> dict[str, Any] | None:
        """The choice's first part of a stream, if it has one before any text."""

    def part(self, choice: int, piece: Piece, reason: FinishReason | None) -> dict[str, Any]:
        """What came next of a choice, for a stream."""

    def event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """An event of a stream."""

    def whole(self, choices: Sequence[Finished], usage: Usage) -> dict[str, Any]:
        """The whole answer at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """What every part of one answer begins with."""

    prefix: str
    model: str
    system_fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))
    token: str = field(default_factory=lambda: secrets.token_hex(12))

    def fields(self) -> dict[str, Any]:
        """The fields as they are sent."""
        return {
            "id": f"{self.prefix}-{self.token}",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


class CompletionShape:
    """`text_completion` objects, in a stream too."""

    def __init__(self, tokenizer: Tokenizer, named: Named, *, logprobs: bool) -> None:
        self._tokenizer, self._fields, self._logprobs = tokenizer, named.fields(), logprobs

    def opening(self, choice: int) -> None:
        """Nothing comes before the text."""

    def part(self, choice: int, piece: Piece, reason: FinishReason | None) -> dict[str, Any]:
        """A choice, complete or not."""
        return self._choice(choice, piece, reason).model_dump()

    def event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """An event of a stream."""
        return {"object": "text_completion", **self._fields, "choices": choices}

    def whole(self, choices: Sequence[Finished], usage: Usage) -> dict[str, Any]:
        """The whole answer at once."""
        made = [self._choice(i, *finished) for i, finished in enumerate(choices)]
        return Completion(**self._fields, choices=made, usage=usage).model_dump()

    def _choice(self, choice: int, piece: Piece, reason: FinishReason | None) -> CompletionChoice:
        logprobs = self._scores(piece.scored) if self._logprobs else None
        return CompletionChoice(
            index=choice, text=piece.text, logprobs=logprobs, finish_reason=reason
        )

    def _scores(self, scored: Sequence[Scored]) -> CompletionLogprobs:
        text = self._tokenizer
        return CompletionLogprobs(
            tokens=[spelling(text, score.sampled.token_id) for score in scored],
            token_logprobs=[score.sampled.logprob or 0.0 for score in scored],
            top_logprobs=[
                {spelling(text, token): value for token, value in score.sampled.top_logprobs}
                for score in scored
            ],
            text_offset=[score.offset for score in scored],
        )


class ChatShape:
    """`chat.completion` objects, and `chat.completion.chunk` in a stream."""

    def __init__(self, tokenizer: Tokenizer, named: Named, *, logprobs: bool) -> None:
        self._tokenizer, self._fields, self._logprobs = tokenizer, named.fields(), logprobs

    def opening(self, choice: int) -> dict[str, Any]:
        """Who speaks."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}

    def part(self, choice: int, piece: Piece, reason: FinishReason | None) -> dict[str, Any]:
        """What the answer goes on with; an empty delta tells how it ended."""
        delta = {"content": piece.text} if piece.text or piece.scored else {}
        logprobs = self._scores(piece.scored) if piece.scored else None
        return {
            "index": choice,
            "delta": delta,
            "logprobs": None if logprobs is None else logprobs.model_dump(),
            "finish_reason": reason,
        }

    def event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """An event of a stream."""
        return {"object": "chat.completion.chunk", **self._fields, "choices": choices}

    def whole(self, choices: Sequence[Finished], usage: Usage) -> dict[str, Any]:
        """The whole answer at once."""
        made = [
            ChatChoice(
                index=i,
                message=AnswerMessage(content=piece.text),
                logprobs=self._scores(piece.scored) if self._logprobs else None,
                finish_reason=reason,
            )
            for i, (piece, reason) in enumerate(choices)
        ]
        return ChatCompletion(**self._fields, choices=made, usage=usage).model_dump()

    def _scores(self, scored: Sequence[Scored]) -> ChatLogprobs:
        return ChatLogprobs(
            content=[
                TokenLogprob(
                    **self._score(score.sampled.token_id, score.sampled.logprob or 0.0),
                    top_logprobs=[
                        TopLogprob(**self._score(*likely)) for likely in score.sampled.top_logprobs
                    ],
                )
                for score in scored
            ]
        )

    def _score(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.bytes_of(token_id)
        text = data.decode("utf-8", errors="replace")
        return {"token": text, "logprob": logprob, "bytes": list(data)}


def usage_of(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Usage:
    """The bill."""
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptDetails(cached_tokens=cached_tokens),
    )


def spelling(tokenizer: Tokenizer, token_id: int) -> str:
    r"""A token as completions name it: its text, or `bytes:\xe2\x82` for a part of a character."""
    data = tokenizer.bytes_of(token_id)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
