"""Check keys and enforce limits. Knows nothing about what requests contain.

`Gate` is a layer around the application that runs before any body is read: it checks key, state,
size and time. `PatientProtocol` cuts off connections whose clients do not read or send.
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

OPEN_PATHS = ("/", "/health", "/ready")  # these need no key
WORK_PATHS = ("/v1/completions", "/v1/chat/completions")
KNOWN_PATHS = (*OPEN_PATHS, *WORK_PATHS, "/v1/models", "/metrics", "/openapi.json")
DISCARDED = 64 << 20  # bytes read and dropped of a body that is too large
CLIENT_LEFT = 499  # the status that nginx logs for this


class Gate:
    """The outermost layer of the application: refuses requests, limits and counts the others."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        api_keys: Sequence[str],
        metrics: Metrics,
    ) -> None:
        self.refusal: ApiError | None = None  # while set, work is refused with it
        self.running = 0  # requests for work that have not ended yet
        self._app, self._limits, self._metrics = app, limits, metrics
        self._keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request to the application, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, path, status = perf_counter(), scope["path"], CLIENT_LEFT
        work = path in WORK_PATHS

        async def recording(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.running += work
        try:
            refusal = self._refused(scope, work=work)
            if refusal is not None:
                await refusal.response()(scope, receive, recording)
            else:
                await self._app(scope, Body(receive, self._limits), recording)
        finally:
            self.running -= work
            self._metrics.requests.labels(_path_label(path), str(status)).inc()
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
        matches = [hmac.compare_digest(key.strip(), valid) for valid in self._keys]
        return scheme.lower() == b"bearer" and any(matches)


class Body:
    """Receives the body of a request, within the limits of size and time."""

    def __init__(self, receive: Receive, limits: Limits) -> None:
        self._receive, self._limits = receive, limits
        self._size = 0
        self._complete = False
        self._deadline = asyncio.get_running_loop().time() + limits.read_s

    async def __call__(self) -> Message:
        """Return the next message.

        Raises ApiError 408 if the body is late, 413 if it is too large. The latter is raised after
        the rest has been read, since a client that is still sending would not read the answer.
        """
        if self._complete:  # the next message is the disconnect, whenever that is
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._next()
                while self._too_large() and message.get("more_body") and self._size < DISCARDED:
                    message = await self._next()
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
    """HTTP/1.1 that cuts off clients which stall for `stall_s` seconds.

    Up to 64 KiB are buffered for a client that does not read; then the writer waits, for at most
    `stall_s`. The head of a request must arrive within `stall_s` too: uvicorn's own timeout runs
    only between requests, and any byte stops it.
    """

    stall_s = 30.0
    _timers: dict[str, asyncio.TimerHandle]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer for the first request."""
        super().connection_made(transport)
        self._timers = {}
        self._start_timer("request")

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timers."""
        super().connection_lost(exc)
        for name in list(self._timers):
            self._stop_timer(name)

    def data_received(self, data: bytes) -> None:
        """Stop the timer if the head of a request is complete; start it if one has begun."""
        super().data_received(data)
        if not self._is_owed_more():
            self._stop_timer("request")
        elif "request" not in self._timers:
            self._start_timer("request")

    def pause_writing(self) -> None:
        """Start the timer for a client that does not read."""
        super().pause_writing()
        self._start_timer("stalled")

    def resume_writing(self) -> None:
        """Stop that timer: the client has read most of the buffer."""
        super().resume_writing()
        self._stop_timer("stalled")

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, and abort it if the client keeps it open."""
        super().timeout_keep_alive_handler()
        self._start_timer("closing")

    def _is_owed_more(self) -> bool:
        """Whether a head is incomplete, or the body of an answered request is."""
        theirs = self.conn.their_state
        if theirs is h11.IDLE:
            return bool(self.conn.trailing_data[0])
        return theirs is h11.SEND_BODY and self.conn.our_state is h11.DONE

    def _start_timer(self, name: str) -> None:
        self._timers[name] = self.loop.call_later(self.stall_s, self.transport.abort)

    def _stop_timer(self, name: str) -> None:
        if name in self._timers:
            self._timers.pop(name).cancel()


def protocol(limits: Limits) -> type[PatientProtocol]:
    """Return the protocol class with this server's `stall_s`."""
    attributes: dict[str, Any] = {"stall_s": limits.stall_s}
    return type("Protocol", (PatientProtocol,), attributes)


def _path_label(path: str) -> str:
    """Return the metric label of a path. Unknown paths share one: a scan would make thousands."""
    if path.startswith("/v1/models/"):
        return "/v1/models/{model}"
    return path if path in KNOWN_PATHS else "other"
