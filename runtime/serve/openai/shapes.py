"""Build the answers of both APIs from text and log-probabilities. Knows nothing about HTTP."""

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
    """The form of one API's answers."""

    def opening(self, choice: int) -> dict[str, Any] | None:
        """Return what a stream sends of a choice before any text, or None."""

    def part(self, choice: int, piece: Piece, reason: FinishReason | None) -> dict[str, Any]:
        """Return the next part of a choice, for a stream."""

    def event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Wrap parts of choices into an event of a stream."""

    def whole(self, choices: Sequence[Finished], usage: Usage) -> dict[str, Any]:
        """Return the whole answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerId:
    """Fields that every part of one answer has."""

    prefix: str
    model: str
    system_fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))
    token: str = field(default_factory=lambda: secrets.token_hex(12))

    def fields(self) -> dict[str, Any]:
        """Return the fields as they are sent."""
        return {
            "id": f"{self.prefix}-{self.token}",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


class CompletionShape:
    """Answers of /v1/completions: `text_completion` objects, also in a stream."""

    def __init__(self, tokenizer: Tokenizer, answer: AnswerId, *, logprobs: bool) -> None:
        self._tokenizer, self._fields, self._logprobs = tokenizer, answer.fields(), logprobs

    def opening(self, choice: int) -> None:
        """Nothing is sent before the text."""

    def part(self, choice: int, piece: Piece, reason: FinishReason | None) -> dict[str, Any]:
        """Return the next part of a choice."""
        return self._choice(choice, piece, reason).model_dump()

    def event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Wrap parts of choices into an event of a stream."""
        return {"object": "text_completion", **self._fields, "choices": choices}

    def whole(self, choices: Sequence[Finished], usage: Usage) -> dict[str, Any]:
        """Return the whole answer."""
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
    """Answers to chats: `chat.completion` objects, or `chat.completion.chunk` in a stream."""

    def __init__(self, tokenizer: Tokenizer, answer: AnswerId, *, logprobs: bool) -> None:
        self._tokenizer, self._fields, self._logprobs = tokenizer, answer.fields(), logprobs

    def opening(self, choice: int) -> dict[str, Any]:
        """Return the role of the speaker."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}

    def part(self, choice: int, piece: Piece, reason: FinishReason | None) -> dict[str, Any]:
        """Return the next part of an answer; the last has an empty delta and a reason."""
        delta = {"content": piece.text} if piece.text or piece.scored else {}
        logprobs = self._scores(piece.scored) if piece.scored else None
        return {
            "index": choice,
            "delta": delta,
            "logprobs": None if logprobs is None else logprobs.model_dump(),
            "finish_reason": reason,
        }

    def event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Wrap parts of choices into an event of a stream."""
        return {"object": "chat.completion.chunk", **self._fields, "choices": choices}

    def whole(self, choices: Sequence[Finished], usage: Usage) -> dict[str, Any]:
        """Return the whole answer."""
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
    """Token usage for the response."""
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptDetails(cached_tokens=cached_tokens),
    )


def spelling(tokenizer: Tokenizer, token_id: int) -> str:
    r"""Spell a token for completions: its text, or `bytes:\xe2\x82` for part of a character."""
    data = tokenizer.bytes_of(token_id)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
