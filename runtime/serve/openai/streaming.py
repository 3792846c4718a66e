"""Send answers, whole or as server-sent events. Knows nothing about paths or request bodies.

When a client disconnects, streaming or not, its request is cancelled, and its rows are free with
the scheduler's next step.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from graphs.errors import UsageError
from runtime.scheduling.request import End
from runtime.serve.errors import ApiError, JsonResponse, error_body
from runtime.serve.jobs import Arrival, Job
from runtime.serve.openai.answer import Answer, Piece, Scored
from runtime.serve.openai.calls import Call
from runtime.serve.openai.schemas import FinishReason, Usage
from runtime.serve.openai.shapes import Finished, Shape, usage_of
from runtime.text.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # keeps proxies from buffering the stream
]


class Step(NamedTuple):
    """The next part of one choice, with the reason if it is the last."""

    choice: int
    piece: Piece
    reason: FinishReason | None


class Progress:
    """Reads arriving tokens into the answers of one call."""

    def __init__(self, job: Job, call: Call, tokenizer: Tokenizer) -> None:
        self._job, self._n = job, call.n
        self._cached: dict[int, int] = {}  # by prompt: the least that any of its choices found
        logprobs = call.logprobs is not None
        self.answers = [
            Answer(tokenizer, call.stops, chat=call.chat, logprobs=logprobs)
            for _ in range(len(call.prompts) * call.n)
        ]

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that no choice had to compute, over all prompts."""
        return sum(self._cached.values())

    async def steps(self) -> AsyncIterator[list[Step]]:
        """Yield new parts of choices as they arrive, until every choice has ended.

        Tokens that arrive while the client is still reading earlier ones are put together. Raises
        ApiError if the model or the scheduler failed.
        """
        while not self._job.done:
            arrivals: dict[int, list[Arrival]] = {}
            for arrival in await self._job.take():
                arrivals.setdefault(arrival.choice, []).append(arrival)
            yield [step for choice, items in arrivals.items() for step in self._read(choice, items)]

    def _read(self, choice: int, arrivals: list[Arrival]) -> list[Step]:
        answer, text, scored = self.answers[choice], "", list[Scored]()
        reason: FinishReason | None = None
        stopped_before = answer.stopped
        for arrival in arrivals:
            if isinstance(arrival.item, End):
                prompt, cached = choice // self._n, arrival.item.cached_tokens
                self._cached[prompt] = min(cached, self._cached.get(prompt, cached))
                piece = answer.finish()
                if not answer.stopped:
                    reason = _reason(arrival.item)
            else:
                piece = answer.push(arrival.item)
            text += piece.text
            scored += piece.scored
        if answer.stopped and not stopped_before:
            reason = "stop"
            self._job.cancel(choice)
        if not text and not scored and reason is None:
            return []
        return [Step(choice, Piece(text, tuple(scored)), reason)]


class Reply(Response):
    """The response to one call: sends what `job` delivers, in the form of `shape`."""

    def __init__(
        self, job: Job, call: Call, shape: Shape, tokenizer: Tokenizer, timeout_s: float
    ) -> None:
        super().__init__()
        self._job, self._call, self._shape = job, call, shape
        self._progress = Progress(job, call, tokenizer)
        self._timeout_s = timeout_s
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer. Stops without sending more if the client disconnects or stalls."""
        work = asyncio.create_task(self._answer(scope, receive, send))
        gone = [
            asyncio.create_task(_disconnected(receive)),
            asyncio.create_task(_set(self._job.overflow)),
        ]
        try:
            await asyncio.wait([work, *gone], return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            self._job.cancel()
            for task in (work, *gone):
                task.cancel()
            await asyncio.gather(work, *gone, return_exceptions=True)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                if self._call.stream:
                    await self._events(send)
                else:
                    await JsonResponse(await self._whole())(scope, receive, send)
        except TimeoutError:
            failure = ApiError(
                504, f"The answer was not complete after {self._timeout_s:g} s, which is this "
                "server's limit. Ask for fewer tokens, or stream.", code="timeout",
            )  # fmt: skip
        except ApiError as error:
            failure = error
        else:
            return
        if not self._started:
            raise failure
        status = failure.status_code
        error_event = error_body(status, str(failure.detail), failure.param, failure.code)
        await send(_body(_event(error_event) + DONE, more=False))

    async def _whole(self) -> dict[str, Any]:
        choices = len(self._progress.answers)
        texts: list[list[str]] = [[] for _ in range(choices)]
        scored: list[list[Scored]] = [[] for _ in range(choices)]
        reasons: list[FinishReason] = ["stop"] * choices
        async for steps in self._progress.steps():
            for choice, piece, reason in steps:
                texts[choice].append(piece.text)
                scored[choice] += piece.scored
                reasons[choice] = reason or reasons[choice]
        finished = [
            Finished(Piece("".join(texts[i]), tuple(scored[i])), reasons[i]) for i in range(choices)
        ]
        return self._shape.whole(finished, self._usage())

    async def _events(self, send: Send) -> None:
        usage_later: dict[str, Any] = {"usage": None} if self._call.include_usage else {}
        async for steps in self._progress.steps():
            events = []
            if not self._started:  # not earlier: until now an error has its own status
                await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
                self._started = True
                opening = map(self._shape.opening, range(len(self._progress.answers)))
                events += [part for part in opening if part is not None]
            for choice, piece, reason in steps:
                if piece.text or piece.scored:
                    events.append(self._shape.part(choice, piece, None))
                if reason is not None:
                    events.append(self._shape.part(choice, Piece("", ()), reason))
            if events:
                data = (_event(self._shape.event([part]) | usage_later) for part in events)
                await send(_body(b"".join(data)))
        end = DONE
        if self._call.include_usage:
            usage = {"usage": self._usage().model_dump()}
            end = _event(self._shape.event([]) | usage) + DONE
        await send(_body(end, more=False))

    def _usage(self) -> Usage:
        completion_tokens = sum(answer.count for answer in self._progress.answers)
        return usage_of(self._call.prompt_tokens, completion_tokens, self._progress.cached_tokens)


def _reason(end: End) -> FinishReason:
    """Return why a choice ended. Raises ApiError if it was cancelled or failed."""
    if end.reason in ("stop", "length"):
        return "stop" if end.reason == "stop" else "length"
    if end.reason == "cancelled":
        raise ApiError(503, "The server is shutting down. Send the request again.")
    if isinstance(end.error, UsageError):
        raise ApiError(400, str(end.error))
    raise ApiError(500, f"The model failed: {end.error}")


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, separators=(",", ":")).encode("ascii") + b"\n\n"


def _body(data: bytes, *, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _set(event: asyncio.Event) -> None:
    await event.wait()
