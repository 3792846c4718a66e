"""Who is let in, and how much of a request is taken. Knows nothing about what is asked.

One layer around the application, before any body is read: keys, state, size, time. And the
connection itself: a client that takes nothing is cut off.
"""

import asyncio
import hmac
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from runtime.serve.errors import ApiError
from runtime.serve.metrics import Metrics
from runtime.serve.settings import Limits

OPEN_PATHS = ("/", "/health", "/ready")  # no key is asked for here
WORK_PATHS = ("/v1/completions", "/v1/chat/completions")
KNOWN_PATHS = (*OPEN_PATHS, *WORK_PATHS, "/v1/models", "/metrics", "/openapi.json")
DISCARDED = 64 << 20  # bytes of a body that is too large which are read and dropped
CLIENT_LEFT = 499  # as nginx logs it


class Gate:
    """The outermost layer of the application; counts what passes."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        api_keys: Sequence[str],
        metrics: Metrics,
    ) -> None:
        self.refusal: ApiError | None = None  # while set, no work is taken
        self.running = 0  # requests for work that have not ended
        self._app, self._limits, self._metrics = app, limits, metrics
        self._keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, path, status = perf_counter(), scope["path"], CLIENT_LEFT
        work = path in WORK_PATHS

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.running += work
        try:
            refusal = self._refused(scope, work=work)
            if refusal is not None:
                await refusal.response()(scope, receive, noting)
            else:
                await self._app(scope, Body(receive, self._limits), noting)
        finally:
            self.running -= work
            self._metrics.requests.labels(_known(path), str(status)).inc()
            if work:
                self._metrics.duration.observe(perf_counter() - began)

    def _refused(self, scope: Scope, *, work: bool) -> ApiError | None:
        if self._keys and scope["path"] not in OPEN_PATHS and not self._has_key(scope):
            return ApiError(
                401, "No valid API key was given. Send one as `Authorization: Bearer KEY`.",
                code="invalid_api_key",
            )  # fmt: skip
        return self.refusal if work else None

    def _has_key(self, scope: Scope) -> bool:
        """Compare with every key, each in constant time."""
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        matches = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        return scheme.lower() == b"bearer" and any(matches)


class Body:
    """Receives a request's body, up to a size and within a time."""

    def __init__(self, receive: Receive, limits: Limits) -> None:
        self._receive, self._limits = receive, limits
        self._size = 0
        self._complete = False
        self._deadline = asyncio.get_running_loop().time() + limits.read_s

    async def __call__(self) -> Message:
        """The next message. Raises ApiError 413 or 408, the former once the body is gone."""
        if self._complete:  # what comes now is the client's leaving, whenever that is
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._next()
                while self._too_large() and message.get("more_body") and self._size < DISCARDED:
                    message = await self._next()  # who still sends would not read the answer
        except TimeoutError as error:
            raise ApiError(
                408, f"The request's body was not complete after {self._limits.read_s:g} s."
            ) from error
        if self._too_large():
            raise ApiError(
                413, f"The request's body is larger than {self._limits.max_body_bytes} bytes, "
                "which is this server's limit. Send less at a time.", code="request_too_large",
            )  # fmt: skip
        return message

    def _too_large(self) -> bool:
        return self._size > self._limits.max_body_bytes

    async def _next(self) -> Message:
        message = await self._receive()
        self._size += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        return message


class PatientProtocol(H11Protocol):
    """HTTP/1.1 with an end to patience.

    Up to 64 KiB wait for a client; then the writer does. A client for which the writer waits
    `stall_s` seconds is cut off. So is one whose request takes longer to begin: uvicorn's own
    clock runs between requests only, and any byte stops it.
    """

    stall_s = 30.0
    _timers: dict[str, asyncio.TimerHandle]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._timers = {}
        self._abort_after_stall("request")

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        super().connection_lost(exc)
        for name in list(self._timers):
            self._forget(name)

    def data_received(self, data: bytes) -> None:
        """See whether that completed the head of a request, or began one."""
        super().data_received(data)
        if not self._is_owed_more():
            self._forget("request")
        elif "request" not in self._timers:
            self._abort_after_stall("request")

    def pause_writing(self) -> None:
        """The client does not take what waits for it."""
        super().pause_writing()
        self._abort_after_stall("stalled")

    def resume_writing(self) -> None:
        """It took most of it."""
        super().resume_writing()
        self._forget("stalled")

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, and be sure that it closes."""
        super().timeout_keep_alive_handler()
        self._abort_after_stall("closing")

    def _is_owed_more(self) -> bool:
        """Whether there is half a head, or half a body that nobody wants any more."""
        theirs = self.conn.their_state
        if theirs is h11.IDLE:
            return bool(self.conn.trailing_data[0])
        return theirs is h11.SEND_BODY and self.conn.our_state is h11.DONE

    def _abort_after_stall(self, name: str) -> None:
        self._timers[name] = self.loop.call_later(self.stall_s, self.transport.abort)

    def _forget(self, name: str) -> None:
        if name in self._timers:
            self._timers.pop(name).cancel()


def protocol(limits: Limits) -> type[PatientProtocol]:
    """The protocol with this server's patience."""
    attributes: dict[str, Any] = {"stall_s": limits.stall_s}
    return type("Protocol", (PatientProtocol,), attributes)


def _known(path: str) -> str:
    """The path as a label; every other path is one label, or a scan would make thousands."""
    if path.startswith("/v1/models/"):
        return "/v1/models/{model}"
    return path if path in KNOWN_PATHS else "other"
