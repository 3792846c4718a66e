"""Fuzz the request bodies of the server, calling the ASGI application without a socket.

A body counts as read if it gets the response it asked for, and as refused if it gets a 4xx with
OpenAI's error object. After every case the scheduler must be idle, and a plain request must get
the same response as before.
"""

import asyncio
import atexit
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

from graphs.errors import MistralcError
from runtime.serve.app import make_app
from runtime.serve.limits import Gate
from runtime.serve.service import Service, raise_failure
from runtime.serve.settings import Limits, Settings
from tests.reliability.harness.damage import Draw, damaged_bytes
from tests.reliability.harness.guard import check_message
from tests.reliability.harness.target import Prepared, Target
from tests.reliability.harness.tiny_bundle import tiny_bundle
from tests.reliability.targets.request_bodies import CONTENT_TYPES, bodies, seeds

MAX_NEW_TOKENS = 16  # per choice
LIMITS = Limits(max_new_tokens=MAX_NEW_TOKENS, max_body_bytes=200_000, max_waiting=64)
PLAIN = {"model": "tiny", "prompt": "The ring", "max_tokens": 3, "temperature": 0}


class Request(NamedTuple):
    """A POST request with its complete body."""

    path: str
    content_type: str | None
    body: bytes


class Response(NamedTuple):
    """A complete response, streamed or not."""

    status: int
    content_type: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Choice:
    """One choice, streamed or not, with log-probabilities of its tokens if they were requested."""

    text: str
    reason: str | None
    logprobs: list[float] | None


class Application:
    """The server's application on its own event loop, which runs only during a request."""

    def __init__(self, bundle: Path) -> None:
        self._runner = asyncio.Runner()
        atexit.register(self._runner.close)
        self._defects: list[dict[str, Any]] = []
        self._runner.get_loop().set_exception_handler(
            lambda _, context: self._defects.append(context)
        )
        settings = Settings(
            bundle=bundle, model="tiny", rows=4, threads=1, prefix_bytes=1 << 20, limits=LIMITS
        )
        self.service = Service(settings)
        self._app = Gate(
            make_app(self.service), limits=LIMITS, api_keys=(), metrics=self.service.metrics
        )
        self._runner.run(self._load())
        self._plain = self._plain_text()

    def post(self, request: Request) -> Response:
        """Send one request; an exception that escapes the application propagates."""
        return self._runner.run(self._post(request))

    def check(self) -> None:
        """Assert that the last request has no effect on later ones."""
        self._runner.run(self._wait_until_idle())
        assert not self._defects, f"uncaught errors on the event loop: {self._defects}"
        assert self._plain_text() == self._plain, "a later request gets a different response"

    def _plain_text(self) -> str:
        got = self.post(Request("/v1/completions", "application/json", json.dumps(PLAIN).encode()))
        text: str = json.loads(got.body)["choices"][0]["text"]
        return text

    async def _load(self) -> None:
        self.service.begin_to_load()
        while self.service.state == "loading":
            raise_failure(self.service)
            await asyncio.sleep(0.01)

    async def _wait_until_idle(self) -> None:
        while (stats := self.service.ready().scheduler.stats()).running + stats.waiting:
            await asyncio.sleep(0)

    async def _post(self, request: Request) -> Response:
        kinds = [] if request.content_type is None else [request.content_type.encode("latin-1")]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "path": request.path, "raw_path": request.path.encode(), "query_string": b"",
            "root_path": "", "scheme": "http", "server": ("test", 80), "client": ("test", 1),
            "headers": [(b"host", b"test"), *((b"content-type", kind) for kind in kinds)],
        }  # fmt: skip
        half = len(request.body) // 2
        parts = [request.body[:half], request.body[half:]]
        messages: list[Any] = []

        async def receive() -> Any:
            if not parts:
                await asyncio.Future()  # the client stays connected
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

        async def send(message: Any) -> None:
            messages.append(message)

        await self._app(scope, receive, send)
        assert [one["type"] for one in messages[:1]] == ["http.response.start"], "no response"
        assert {one["type"] for one in messages[1:]} == {"http.response.body"}, "two responses"
        kind = dict(messages[0]["headers"])[b"content-type"].decode()
        body = b"".join(one.get("body", b"") for one in messages[1:])
        return Response(messages[0]["status"], kind, body)


@cache
def application() -> Application:
    """The application that all targets of this process share."""
    return Application(tiny_bundle())


def _prepare(path: str, _folder: Path) -> Prepared:
    application()
    written = [json.dumps(seed).encode() for seed in seeds(path)]
    plain = bodies(path)
    raw = st.sampled_from(written).flatmap(damaged_bytes) | st.binary(max_size=200)

    @st.composite
    def cases(draw: Draw) -> Request:
        if draw(st.integers(0, 9)):
            return Request(path, "application/json", draw(plain))
        return Request(path, draw(st.sampled_from(CONTENT_TYPES)), draw(plain | raw))

    good = Request(path, "application/json", written[0])
    return Prepared(cases=cases(), read=_read, size=lambda case: len(case.body), good=good)


def _read(request: Request) -> None:
    """Send a request and check the response against it. Raises MistralcError for a 4xx."""
    response = application().post(request)
    application().check()
    if 400 <= response.status < 500:
        raise MistralcError(error_message(response))
    assert response.status == 200, f"{response.status}: {response.body[:500]!r}"
    body = json.loads(request.body)
    chat = request.path == "/v1/chat/completions"
    unwrap = _unwrap_stream if body.get("stream") else _unwrap_json
    choices, usage = unwrap(response, chat=chat)
    check_choices(choices, body, chat=chat)
    if usage is not None:
        check_usage(usage, len(choices), _max_tokens(body, chat=chat))


def error_message(response: Response) -> str:
    """The message of OpenAI's error object; one paragraph, as for commands."""
    assert response.content_type == "application/json", response.content_type
    error = json.loads(response.body)
    assert list(error) == ["error"], error
    assert sorted(error["error"]) == ["code", "message", "param", "type"], error
    message: str = error["error"]["message"]
    check_message(message)
    for name in ("type", "param", "code"):
        value = error["error"][name]
        assert value is None or (isinstance(value, str) and len(value) < 200), f"{name}: {value!r}"
    return message


Unwrapped = tuple[list[Choice], dict[str, Any] | None]


def _unwrap_json(response: Response, *, chat: bool) -> Unwrapped:
    assert response.content_type == "application/json", response.content_type
    answer = json.loads(response.body)
    assert answer["object"] == ("chat.completion" if chat else "text_completion")
    assert [choice["index"] for choice in answer["choices"]] == [*range(len(answer["choices"]))]
    choices = [
        Choice(
            choice["message"]["content"] if chat else choice["text"],
            choice["finish_reason"],
            _logprobs(choice, chat=chat),
        )
        for choice in answer["choices"]
    ]
    return choices, answer["usage"]


def _unwrap_stream(response: Response, *, chat: bool) -> Unwrapped:
    assert response.content_type.startswith("text/event-stream"), response.content_type
    found: dict[int, Choice] = {}
    usage = None
    for event in _events(response.body):
        assert "error" not in event, event
        usage = event.get("usage") or usage
        for part in event["choices"]:
            before = found.get(part["index"], Choice("", None, None))
            assert before.reason is None, "a choice continued after its finish_reason"
            text = part["delta"].get("content") or "" if chat else part["text"]
            scores = (_logprobs(part, chat=chat) or []) + (before.logprobs or [])
            found[part["index"]] = Choice(before.text + text, part["finish_reason"], scores)
    return [found[i] for i in range(len(found))], usage


def _events(body: bytes) -> Iterator[dict[str, Any]]:
    *events, done, rest = body.decode("ascii").split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    for event in events:
        assert event.startswith("data: "), event
        yield json.loads(event.removeprefix("data: "))


def _logprobs(choice: dict[str, Any], *, chat: bool) -> list[float] | None:
    found = choice["logprobs"]
    if found is None:
        return None
    if chat:
        return [entry["logprob"] for entry in found["content"]]
    assert len(found["tokens"]) == len(found["text_offset"]) == len(found["token_logprobs"])
    assert found["text_offset"] == sorted(found["text_offset"])
    scores: list[float] = found["token_logprobs"]
    return scores


def check_choices(choices: list[Choice], body: dict[str, Any], *, chat: bool) -> None:
    """Assert that the choices satisfy the request: number, finish reason, stops, logprobs, JSON."""
    assert len(choices) == (1 if chat else _prompts(body["prompt"])) * (body.get("n") or 1)
    stops = body.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    for choice in choices:
        assert choice.reason in ("stop", "length"), choice
        assert not any(stop in choice.text for stop in stops), "the text contains a stop string"
        if choice.logprobs is not None:
            assert len(choice.logprobs) <= _max_tokens(body, chat=chat)
            assert all(math.isfinite(score) and score < 1e-3 for score in choice.logprobs), choice
        form = (body.get("response_format") or {}).get("type")
        if form in ("json_object", "json_schema") and choice.reason == "stop" and not stops:
            json.loads(choice.text)


def check_usage(usage: dict[str, Any], choices: int, max_tokens: int) -> None:
    prompt, completion = usage["prompt_tokens"], usage["completion_tokens"]
    assert usage["total_tokens"] == prompt + completion
    assert 0 <= usage["prompt_tokens_details"]["cached_tokens"] < prompt
    assert choices <= completion <= choices * max_tokens, f"{completion} tokens"


def _max_tokens(body: dict[str, Any], *, chat: bool) -> int:
    limit: int | None = body.get("max_tokens")
    return limit or (chat and body.get("max_completion_tokens")) or MAX_NEW_TOKENS


def _prompts(prompt: Any) -> int:
    single = isinstance(prompt, str) or isinstance(prompt[0], int)
    return 1 if single else len(prompt)


def _target(path: str) -> Callable[[Path], Prepared]:
    return partial(_prepare, path)


TARGETS = (
    Target(name="body of /v1/completions", prepare=_target("/v1/completions"), examples=60),
    Target(
        name="body of /v1/chat/completions", prepare=_target("/v1/chat/completions"), examples=60
    ),
)
