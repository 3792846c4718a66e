"""Translate a request's body into requests for the scheduler. Knows nothing about HTTP.

This can be slow (a megabyte of text to encode, a grammar to compile), so it runs in a thread beside
the event loop.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from graphs.errors import MistralcError
from runtime.decoding.sampling import SamplingParams
from runtime.decoding.sampling_defaults import sampling_params
from runtime.scheduling.request import Request
from runtime.serve.errors import ApiError
from runtime.serve.openai.schemas import (
    MAX_CHOICES,
    ChatRequest,
    CompletionRequest,
    JsonObjectFormat,
    JsonSchemaFormat,
    Sampling,
)
from runtime.serve.settings import Limits
from runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from runtime.serve.openai.grammar import GrammarConstraint, Grammars

COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty",
                   "presence_penalty", "frequency_penalty")  # fmt: skip
Constrain = Callable[[], "GrammarConstraint"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One HTTP request, checked and encoded: every prompt is continued `n` times.

    Choice i belongs to prompt i // n.
    """

    prompts: tuple[tuple[int, ...], ...]
    n: int
    params: SamplingParams
    max_new_tokens: int
    stop_ids: frozenset[int]
    stops: tuple[str, ...]
    chat: bool
    constrain: Constrain | None
    stream: bool
    include_usage: bool

    @property
    def logprobs(self) -> int | None:
        """How many of the likeliest tokens are reported with each token; None: no logprobs."""
        return self.params.logprobs

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts; a prompt counts once, however many choices continue it."""
        return sum(map(len, self.prompts))

    def requests(self) -> list[Request]:
        """Make one request for each choice; choice i gets the given seed plus i."""
        return [
            Request(
                ids=self.prompts[choice // self.n],
                params=self._params(choice),
                max_new_tokens=self.max_new_tokens,
                stop_ids=self.stop_ids,
                constraint=None if self.constrain is None else self.constrain(),
            )
            for choice in range(len(self.prompts) * self.n)
        ]

    def _params(self, choice: int) -> SamplingParams:
        seed = self.params.seed
        return self.params if seed is None else replace(self.params, seed=(seed + choice) % 2**64)


class Translator:
    """Translates bodies for one bundle. Raises ApiError that names the wrong parameter."""

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, defaults: dict[str, Any], limits: Limits
    ) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self._defaults, self._limits = defaults, limits

    def completion(self, body: CompletionRequest) -> Call:
        """Translate the body of `POST /v1/completions`."""
        if body.best_of not in (None, body.n or 1):
            raise ApiError(
                400, f"best_of is {body.best_of} and n is {body.n or 1}; this server does not rank "
                "choices, so the two must be equal. Leave best_of out.", param="best_of",
            )  # fmt: skip
        prompts = tuple(map(self._encode, _as_list(body.prompt)))
        limit = body.max_tokens or min(COMPLETION_TOKENS, self._limits.max_new_tokens)
        return self._call(body, prompts, limit, "max_tokens", body.logprobs, chat=False)

    def chat(self, body: ChatRequest) -> Call:
        """Translate the body of `POST /v1/chat/completions`."""
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(
                400, "top_logprobs is given without logprobs; set logprobs to true as well.",
                param="top_logprobs",
            )  # fmt: skip
        if None not in (body.max_tokens, body.max_completion_tokens):
            raise ApiError(
                400, "max_tokens and max_completion_tokens are both given and mean the same. "
                "Give one of them.", param="max_completion_tokens",
            )  # fmt: skip
        messages = [
            {
                "role": "system" if message.role == "developer" else message.role,
                "content": message.content if isinstance(message.content, str)
                else "".join(part.text for part in message.content),
            }
            for message in body.messages
        ]  # fmt: skip
        try:
            ids = self.tokenizer.encode_chat(messages)
        except MistralcError as error:
            raise ApiError(400, str(error), param="messages") from error
        name = "max_tokens" if body.max_tokens else "max_completion_tokens"
        limit = body.max_tokens or body.max_completion_tokens or self._limits.max_new_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        prompts = (self._check_prompt(ids, "messages"),)
        return self._call(body, prompts, limit, name, logprobs, chat=True)

    @cached_property
    def grammars(self) -> "Grammars":
        """The grammar compiler for this vocabulary, made when first needed."""
        from runtime.serve.openai.grammar import Grammars

        return Grammars(self.tokenizer, self.vocab_size)

    def _call(
        self,
        body: Sampling,
        prompts: tuple[tuple[int, ...], ...],
        max_new_tokens: int,
        limit_name: str,
        logprobs: int | None,
        *,
        chat: bool,
    ) -> Call:
        n = body.n or 1
        if len(prompts) * n > MAX_CHOICES:
            raise ApiError(
                400, f"{len(prompts)} prompts with n={n} make {len(prompts) * n} choices; one call "
                f"may have up to {MAX_CHOICES}. Send several requests.", param="n",
            )  # fmt: skip
        if max_new_tokens > self._limits.max_new_tokens:
            raise ApiError(
                400, f"{limit_name} is {max_new_tokens}; this server generates up to "
                f"{self._limits.max_new_tokens} tokens for a choice.", param=limit_name,
            )  # fmt: skip
        if body.stream_options is not None and not body.stream:
            raise ApiError(
                400, "stream_options is given without stream; set stream to true.",
                param="stream_options",
            )  # fmt: skip
        stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        return Call(
            prompts=prompts,
            n=n,
            params=self._sampling(body, logprobs),
            max_new_tokens=max_new_tokens,
            stop_ids=self.tokenizer.stop_ids,
            stops=stops,
            chat=chat,
            constrain=self._constraint(body),
            stream=bool(body.stream),
            include_usage=bool(body.stream_options and body.stream_options.include_usage),
        )

    def _sampling(self, body: Sampling, logprobs: int | None) -> SamplingParams:
        """Combine the body's parameters with the checkpoint's defaults."""
        given = {name: getattr(body, name) for name in SAMPLING_FIELDS}
        given = {name: value for name, value in given.items() if value is not None}
        bias = {int(token): float(value) for token, value in (body.logit_bias or {}).items()}
        if bias and max(bias) >= self.vocab_size:
            raise self._no_such_token(max(bias), "logit_bias")
        seed = None if body.seed is None else body.seed % 2**64
        values = given | {"logit_bias": bias, "seed": seed, "logprobs": logprobs}
        return sampling_params(self._defaults, values)

    def _constraint(self, body: Sampling) -> Constrain | None:
        form = body.response_format
        structured = isinstance(form, (JsonObjectFormat, JsonSchemaFormat))
        given = [
            name
            for name, value in (
                ("response_format", structured), ("regex", body.regex), ("grammar", body.grammar),
            )
            if value
        ]  # fmt: skip
        if not given:
            return None
        if len(given) > 1:
            raise ApiError(
                400, f"{' and '.join(given)} are given together; a text can follow only one. Give "
                "one of them.", param=given[-1],
            )  # fmt: skip
        try:
            if body.regex:
                return self.grammars.regex(body.regex).copies()
            if body.grammar:
                return self.grammars.lark(body.grammar).copies()
            schema = form.json_schema.schema_ if isinstance(form, JsonSchemaFormat) else {}
            return self.grammars.json_schema(schema or {"type": "object"}).copies()
        except ModuleNotFoundError as error:
            raise ApiError(
                400, f"{given[0]} needs {error.name}, which this server does not have. Leave it "
                "out, or install it on the server: pip install 'mistralc[serve]'.", param=given[0],
            ) from error  # fmt: skip
        except MistralcError as error:
            raise ApiError(400, str(error), param=given[0]) from error

    def _encode(self, prompt: str | list[int]) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return self._check_prompt(prompt, "prompt")
        try:
            return self._check_prompt(self.tokenizer.encode(prompt), "prompt")
        except MistralcError as error:
            raise ApiError(400, str(error), param="prompt") from error

    def _check_prompt(self, ids: list[int], param: str) -> tuple[int, ...]:
        limit = self._limits.max_prompt_tokens
        if not ids:
            raise ApiError(400, "The prompt is empty; at least one token is expected.", param=param)
        if limit is not None and len(ids) > limit:
            raise ApiError(
                400, f"The prompt has {len(ids)} tokens; this server takes up to {limit}. Shorten "
                "it.", param=param, code="context_length_exceeded",
            )  # fmt: skip
        if max(ids) >= self.vocab_size:
            raise self._no_such_token(max(ids), param)
        return tuple(ids)

    def _no_such_token(self, token_id: int, param: str) -> ApiError:
        return ApiError(
            400, f"{param} has token {token_id}; this model's tokens are 0 to "
            f"{self.vocab_size - 1}.", param=param,
        )  # fmt: skip


def _as_list(prompt: str | list[str] | list[int] | list[list[int]]) -> list[Any]:
    """Return the prompts as a list; each is a text or a list of token ids."""
    if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)
