"""A real server process for tests, with clients and metrics.

The system chooses the port, which the server prints.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from email.message import Message
from pathlib import Path
from typing import Any, NamedTuple

from openai import OpenAI

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60.0  # timeout; nothing here takes a tenth of it
NO_END: dict[str, int] = {"2": -100}  # bans the tiny models' end-of-text token
ENDLESS: dict[str, Any] = {"max_tokens": 1_000_000, "logit_bias": NO_END}
STREAM: dict[str, Any] = ENDLESS | {"stream": True}
FREE = ("--max-new-tokens", 1_000_000)
IMPATIENT = ("--stall-seconds", 1, "--read-seconds", 1, "--max-body-bytes", 50_000)

# The kernel buffers megabytes for a client that does not read; this limits it to kilobytes.
SMALL_BUFFERS = (
    "-c",
    """
import socket
import mistralc
import runtime.serve.server as server

listen = server.listen

def small(host, port):
    listening = listen(host, port)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # inherited by connections
    return listening

server.listen = small
mistralc.main()
""",
)  # a `program` of `serving`


class Answer(NamedTuple):
    """A complete HTTP response."""

    status: int
    headers: "Message[str, str]"  # found in any case
    text: str

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.text)


class Server:
    """A running `mistralc serve`."""

    def __init__(self, process: "subprocess.Popen[str]", url: str, model: str) -> None:
        self.process, self.url, self.model = process, url, model
        self.host, self.port = "127.0.0.1", int(url.rpartition(":")[2])

    def client(self, key: str = "none", **options: Any) -> OpenAI:
        """OpenAI's client, without retries."""
        return OpenAI(
            base_url=f"{self.url}/v1", api_key=key, **{"max_retries": 0, "timeout": 60} | options
        )

    def ask(
        self, path: str, body: Any = None, *, data: bytes | None = None, **headers: str
    ) -> Answer:
        """Send a GET request, or a POST request if there is a body."""
        if body is not None:
            data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)  # noqa: S310
        if data is not None:
            request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:  # noqa: S310
                return Answer(response.status, response.headers, response.read().decode())
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.headers, error.read().decode())

    def complete(self, prompt: Any = "The ring", **options: Any) -> Answer:
        """POST to /v1/completions."""
        return self.ask("/v1/completions", {"model": self.model, "prompt": prompt, **options})

    def metric(self, name: str) -> float:
        """One sample by its name with labels, without the prefix; 0 if there is none."""
        for line in self.ask("/metrics").text.splitlines():
            if line.startswith(f"mistralc_{name} "):
                return float(line.rpartition(" ")[2])
        return 0.0

    def connection(self, body: Mapping[str, Any]) -> socket.socket:
        """A socket on which a completion request was sent and nothing has been read."""
        data = json.dumps({"model": self.model, "prompt": "The ring", **body}).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n"
        )
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # so that it fills quickly
        connection.settimeout(PATIENCE_S)
        connection.connect((self.host, self.port))
        connection.sendall(head.encode() + data)
        return connection

    def signal(self, number: int = signal.SIGTERM) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def wait(self) -> int:
        """Wait for the process to end; return its exit status."""
        return self.process.wait(PATIENCE_S)


def until(condition: Callable[[], Any], what: str) -> None:
    """Wait until `condition` holds; raise TimeoutError after PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {PATIENCE_S:g} s")
        time.sleep(0.02)


def idle(server: Server) -> None:
    """Wait until no row is in use and no request waits."""
    until(
        lambda: server.metric("running_rows") + server.metric("waiting_requests") == 0,
        "a free row",
    )


def begun(connection: socket.socket) -> bytes:
    """The first bytes of a streamed answer."""
    data = connection.recv(1 << 14)
    assert b"200 OK" in data
    return data


def rest(connection: socket.socket) -> bytes:
    """Everything that arrives until the server closes or resets the connection."""
    data = b""
    try:
        while piece := connection.recv(1 << 16):
            data += piece
    except ConnectionResetError:
        pass
    return data


@contextlib.contextmanager
def serving(
    bundle: Path,
    *options: object,
    program: tuple[str, ...] = ("-m", "mistralc"),
    **environment: str,
) -> Iterator[Server]:
    """Serve `bundle` in its own process until the block ends."""
    command = [sys.executable, *program, "serve", str(bundle), "--port", "0", "--json",
               "--model-name", "tiny", "--threads", "1", *map(str, options)]  # fmt: skip
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | environment
    ) as process:
        try:
            yield _started(process)
        finally:
            process.kill()


def _started(process: "subprocess.Popen[str]") -> Server:
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "ready":
            return Server(process, event["url"], event["model"])
    raise RuntimeError(f"the server ended with {process.wait()} before it was ready")
