"""The server process: socket, signals, draining. Knows nothing about requests.

The first SIGTERM or SIGINT starts draining: new work is refused with 503, running requests may
finish within `drain_s`, then the process ends. The second ends it immediately.
"""

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from graphs.errors import MistralcError
from runtime.serve.app import make_app
from runtime.serve.errors import ApiError
from runtime.serve.limits import Gate, protocol
from runtime.serve.service import Service, raise_failure
from runtime.serve.settings import Settings

FLUSH_S = 5  # for the last bytes to reach clients, once no request is running
Report = Callable[[str, str], None]  # event ("listening", "ready", "draining") and URL


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket; port 0 lets the system choose one.

    Raises MistralcError if the address cannot be used.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise MistralcError(
            f"The server cannot listen at {host} port {port} ({error.strerror or error}). Choose "
            "an address of this machine and a free port, or --port 0."
        ) from error


def url_of(listening: socket.socket) -> str:
    """Return the URL for a client on this machine."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(settings: Settings, listening: socket.socket, report: Report) -> None:
    """Serve until a signal arrives. Raises MistralcError if loading or the backend failed."""
    service = Service(settings)
    gate = Gate(
        make_app(service),
        limits=settings.limits,
        api_keys=settings.api_keys,
        metrics=service.metrics,
    )
    config = uvicorn.Config(
        gate, http=protocol(settings.limits), ws="none", lifespan="on", log_level="warning",
        access_log=False, server_header=False, timeout_graceful_shutdown=FLUSH_S,
    )  # fmt: skip
    server = _Server(config, service, gate, url_of(listening), report)
    server.run(sockets=[listening])
    service.close()
    raise_failure(service)
    if server.cut_off:
        raise MistralcError(
            f"{server.cut_off} requests were still running {settings.limits.drain_s:g} s after the "
            "signal and were cut off. Raise --drain-seconds to let them finish."
        )


class _Server(uvicorn.Server):
    """uvicorn's server, changed to keep listening while it drains."""

    def __init__(
        self, config: uvicorn.Config, service: Service, gate: Gate, url: str, report: Report
    ) -> None:
        super().__init__(config)
        self.cut_off = 0  # requests still running at the end of the drain
        self._service, self._gate, self._url, self._report = service, gate, url, report
        self._signalled = False
        self._deadline: float | None = None
        self._announced = False

    def handle_exit(self, sig: int, _frame: FrameType | None) -> None:
        """Drain on the first signal, exit immediately on the second."""
        if self._signalled:
            signal.signal(sig, signal.SIG_DFL)
            os.kill(os.getpid(), sig)
        self._signalled = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening."""
        await super().startup(sockets)
        self._report("listening", self._url)

    async def on_tick(self, counter: int) -> bool:
        """Return whether the server should end. uvicorn calls this ten times a second."""
        state = self._service.state
        if state == "ready" and not self._announced:
            self._announced = True
            self._report("ready", self._url)
        if self._service.failure is not None:
            return True
        if self._signalled:
            return await self._drained() or await super().on_tick(counter)
        return await super().on_tick(counter)

    async def _drained(self) -> bool:
        """Start draining, or check whether it is over; cut off requests that took too long."""
        now = asyncio.get_running_loop().time()
        if self._deadline is None:
            self._deadline = now + self._service.settings.limits.drain_s
            self._service.draining = True
            self._gate.refusal = ApiError(
                503, "The server is shutting down. Send the request to another one.",
                code="draining",
            )  # fmt: skip
            self._report("draining", self._url)
        if self._gate.running and now > self._deadline:
            self.cut_off = self._gate.running
            await asyncio.to_thread(self._service.close)
            return True
        return not self._gate.running
