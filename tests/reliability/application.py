"""Fuzzing the bodies that the server takes. Calls the application itself: no socket, no process.

A body is read when the answer is one that was asked for, refused when it is a 4xx with OpenAI's
error object. After every case nothing may run any more, and a plain request has to be answered as
it was before.
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
from tests.reliability import exported
from tests.reliability.bodies import CONTENT_TYPES, bodies, seeds
from tests.reliability.damage import Draw, damaged_bytes
from tests.reliability.guard import check_message
from tests.reliability.target import Prepared, Target

MOST = 16  # tokens of a choice
LIMITS = Limits(max_new_tokens=MOST, max_body_bytes=200_000, max_waiting=64)
PLAIN = {"model": "tiny", "prompt": "The ring", "max_tokens": 3, "temperature": 0}


class Sent(NamedTuple):
    """What a client sends."""

    path: str
    content_type: str | None
    body: bytes


class Received(NamedTuple):
    """A whole response."""

    status: int
    content_type: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Choice:
    """One choice, streamed or not; log-probabilities of its tokens where they were asked for."""

    text: str
    reason: str | None
    logprobs: list[float] | None


class Application:
    """The server's application on an event loop of its own, which runs while it is asked."""

    def __init__(self, bundle: Path) -> None:
        self._runner = asyncio.Runner()
        atexit.register(self._runner.close)
        self._defects: list[dict[str, Any]] = []
        self._runner.get_loop().set_exception_handler(lambda _, told: self._defects.append(told))
        settings = Settings(
            bundle=bundle, model="tiny", rows=4, threads=1, prefix_bytes=1 << 20, limits=LIMITS
        )
        self.service = Service(settings)
        self._app = Gate(
            make_app(self.service), limits=LIMITS, api_keys=(), metrics=self.service.metrics
        )
        self._runner.run(self._loaded())
        self._plain = self._answer_to_plain()

    def ask(self, sent: Sent) -> Received:
        """Send one request; what the application lets through is raised here."""
        return self._runner.run(self._ask(sent))

    def check(self) -> None:
        """Assert that the last request left nothing behind that others would notice."""
        self._runner.run(self._idle())
        assert not self._defects, f"nobody caught: {self._defects}"
        assert self._answer_to_plain() == self._plain, "another request's answer has changed"

    def _answer_to_plain(self) -> str:
        got = self.ask(Sent("/v1/completions", "application/json", json.dumps(PLAIN).encode()))
        text: str = json.loads(got.body)["choices"][0]["text"]
        return text

    async def _loaded(self) -> None:
        self.service.begin_to_load()
        while self.service.state == "loading":
            raise_failure(self.service)
            await asyncio.sleep(0.01)

    async def _idle(self) -> None:
        while (stats := self.service.ready().scheduler.stats()).running + stats.waiting:
            await asyncio.sleep(0)

    async def _ask(self, sent: Sent) -> Received:
        kinds = [] if sent.content_type is None else [sent.content_type.encode("latin-1")]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "path": sent.path, "raw_path": sent.path.encode(), "query_string": b"",
            "root_path": "", "scheme": "http", "server": ("test", 80), "client": ("test", 1),
            "headers": [(b"host", b"test"), *((b"content-type", kind) for kind in kinds)],
        }  # fmt: skip
        half = len(sent.body) // 2
        parts = [sent.body[:half], sent.body[half:]]
        came: list[Any] = []

        async def receive() -> Any:
            if not parts:
                await asyncio.Future()  # the client stays
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

        async def send(message: Any) -> None:
            came.append(message)

        await self._app(scope, receive, send)
        assert [one["type"] for one in came[:1]] == ["http.response.start"], "no answer"
        assert {one["type"] for one in came[1:]} == {"http.response.body"}, "two answers"
        kind = dict(came[0]["headers"])[b"content-type"].decode()
        body = b"".join(one.get("body", b"") for one in came[1:])
        return Received(came[0]["status"], kind, body)


@cache
def application() -> Application:
    """One for all targets of a process."""
    return Application(exported.bundle())


def _prepare(path: str, _folder: Path) -> Prepared:
    application()
    written = [json.dumps(seed).encode() for seed in seeds(path)]
    plain = bodies(path)
    raw = st.sampled_from(written).flatmap(damaged_bytes) | st.binary(max_size=200)

    @st.composite
    def cases(draw: Draw) -> Sent:
        if draw(st.integers(0, 9)):
            return Sent(path, "application/json", draw(plain))
        return Sent(path, draw(st.sampled_from(CONTENT_TYPES)), draw(plain | raw))

    good = Sent(path, "application/json", written[0])
    return Prepared(cases=cases(), read=_read, size=lambda case: len(case.body), good=good)


def _read(sent: Sent) -> None:
    """Send it, and hold the answer to what was asked. Raises MistralcError where it is refused."""
    received = application().ask(sent)
    application().check()
    if 400 <= received.status < 500:
        raise MistralcError(_refusal(received))
    assert received.status == 200, f"{received.status}: {received.body[:500]!r}"
    asked = json.loads(sent.body)
    chat = sent.path == "/v1/chat/completions"
    unwrap = _of_a_stream if asked.get("stream") else _of_a_whole_answer
    choices, usage = unwrap(received, chat=chat)
    _check_choices(choices, asked, chat=chat)
    if usage is not None:
        _check_usage(usage, len(choices), _most(asked, chat=chat))


def _refusal(received: Received) -> str:
    """The message of OpenAI's error object, which is one paragraph like those of commands."""
    assert received.content_type == "application/json", received.content_type
    error = json.loads(received.body)
    assert list(error) == ["error"], error
    assert sorted(error["error"]) == ["code", "message", "param", "type"], error
    message: str = error["error"]["message"]
    check_message(message)
    for name in ("type", "param", "code"):
        value = error["error"][name]
        assert value is None or (isinstance(value, str) and len(value) < 200), f"{name}: {value!r}"
    return message


Unwrapped = tuple[list[Choice], dict[str, Any] | None]


def _of_a_whole_answer(received: Received, *, chat: bool) -> Unwrapped:
    assert received.content_type == "application/json", received.content_type
    answer = json.loads(received.body)
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


def _of_a_stream(received: Received, *, chat: bool) -> Unwrapped:
    assert received.content_type.startswith("text/event-stream"), received.content_type
    found: dict[int, Choice] = {}
    usage = None
    for event in _events(received.body):
        assert "error" not in event, event
        usage = event.get("usage") or usage
        for part in event["choices"]:
            before = found.get(part["index"], Choice("", None, None))
            assert before.reason is None, "something came after the end of a choice"
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


def _check_choices(choices: list[Choice], asked: dict[str, Any], *, chat: bool) -> None:
    """As many as were asked for, each ended by what can end it and held to what was asked."""
    assert len(choices) == (1 if chat else _prompts(asked["prompt"])) * (asked.get("n") or 1)
    stops = asked.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    for choice in choices:
        assert choice.reason in ("stop", "length"), choice
        assert not any(stop in choice.text for stop in stops), "a stop string was sent"
        if choice.logprobs is not None:
            assert len(choice.logprobs) <= _most(asked, chat=chat)
            assert all(math.isfinite(score) and score < 1e-3 for score in choice.logprobs), choice
        form = (asked.get("response_format") or {}).get("type")
        if form in ("json_object", "json_schema") and choice.reason == "stop" and not stops:
            json.loads(choice.text)


def _check_usage(usage: dict[str, Any], choices: int, most: int) -> None:
    prompt, completion = usage["prompt_tokens"], usage["completion_tokens"]
    assert usage["total_tokens"] == prompt + completion
    assert 0 <= usage["prompt_tokens_details"]["cached_tokens"] < prompt
    assert choices <= completion <= choices * most, f"{completion} tokens of {choices} choices"


def _most(asked: dict[str, Any], *, chat: bool) -> int:
    most: int | None = asked.get("max_tokens")
    return most or (chat and asked.get("max_completion_tokens")) or MOST


def _prompts(prompt: Any) -> int:
    alone = isinstance(prompt, str) or isinstance(prompt[0], int)
    return 1 if alone else len(prompt)


def _target(path: str) -> Callable[[Path], Prepared]:
    return partial(_prepare, path)


TARGETS = (
    Target(name="body of /v1/completions", prepare=_target("/v1/completions"), examples=60),
    Target(
        name="body of /v1/chat/completions", prepare=_target("/v1/chat/completions"), examples=60
    ),
)
