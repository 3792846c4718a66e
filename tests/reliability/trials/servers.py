"""Kill or terminate a server under load, or give it misbehaving clients.

Every streamed text is compared with that of the same request on an idle server. A stream may break
off, but the text received until then must be a prefix of the expected text.
"""

import http.client
import json
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.reliability.harness.trial import Trial
from tests.support.make_checkpoint import tiny_spec, write_checkpoint
from tests.support.serving import (
    ENDLESS,
    FREE,
    IMPATIENT,
    NO_END,
    PATIENCE_S,
    ROOT,
    SMALL_BUFFERS,
    STREAM,
    Server,
    begun,
    idle,
    rest,
    serving,
    until,
)

CLIENTS, ROWS = 8, 4  # more clients than rows, so some requests wait
TOKENS = 60
PROMPTS = ("The ring", "A window slides.", "What is kept", "é, and more", "Once", "1 2 3 4 5")
PATIENT = ("--rows", ROWS, *FREE)


@dataclass(slots=True, kw_only=True)
class Answer:
    """What a client received of one streamed answer. `status` is None if no response arrived."""

    prompt: str
    started: float
    status: int | None = None
    text: str = ""
    complete: bool = False
    refusal: dict[str, Any] = field(default_factory=dict)


def ask(port: int, prompt: str) -> Answer:
    """Request a stream of `TOKENS` greedy tokens and read it until it ends or breaks off."""
    body = {"model": "tiny", "prompt": prompt, "stream": True, "temperature": 0,
            "max_tokens": TOKENS, "logit_bias": NO_END}  # fmt: skip
    answer = Answer(prompt=prompt, started=time.monotonic())
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    with closing(connection):
        try:
            connection.request(
                "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
            )
            response = connection.getresponse()
            answer.status = response.status
            if response.status != 200:
                answer.refusal = json.loads(response.read())["error"]
                answer.refusal["retry_after"] = response.headers["Retry-After"]
                return answer
            for line in response:
                _append_line(answer, line)
        except (OSError, http.client.HTTPException):
            pass  # the stream broke off: `complete` stays False
    return answer


def _append_line(answer: Answer, line: bytes) -> None:
    """Add one line of the stream; a killed server may have left it incomplete."""
    if not line.endswith(b"\n") or not line.strip():
        return
    data = line.decode("ascii").strip().removeprefix("data: ")
    if data == "[DONE]":
        answer.complete = True
        return
    event = json.loads(data)
    answer.refusal = event.get("error", {})
    answer.text += "".join(choice["text"] for choice in event.get("choices", ()))


class Clients:
    """Client threads that send requests until they are stopped or a stream is incomplete."""

    def __init__(self, port: int) -> None:
        self.answers: list[Answer] = []
        self._port, self._stop = port, threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(number,)) for number in range(CLIENTS)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        while not self._stop.is_set():
            answer = ask(self._port, PROMPTS[number % len(PROMPTS)])
            self.answers.append(answer)
            if not answer.complete:
                return
            number += 1

    def join(self, *, stop: bool = False) -> list[Answer]:
        """Wait for all clients and return their answers; `stop` sends no further requests."""
        if stop:
            self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "a client still waits for its answer"
        return self.answers


def inputs(folder: Path) -> None:
    """Write a bundle whose two layers have a window of 8 tokens, so generation has no limit."""
    write_checkpoint(folder / "checkpoint", tiny_spec(window=8))
    words = ("export", str(folder / "checkpoint"), "-o", str(folder / "bundle"), "--quiet")
    subprocess.run([sys.executable, "-m", "mistralc", *words], cwd=ROOT, check=True)


def killed(folder: Path, draw: random.Random) -> str:
    """SIGKILL while all clients stream; then restart on the same port with the same clients."""
    with serving(folder / "bundle", *PATIENT) as server:
        expected = _expected_texts(server)
        with _clients(server) as clients:
            time.sleep(draw.random())
            server.signal(signal.SIGKILL)
            assert server.wait() == -signal.SIGKILL
        answers = clients.join()
    check_texts(answers, expected)
    assert all(one.status in (200, None) for one in answers), "a dead server sent a status"
    assert sum(not one.complete for one in answers) == CLIENTS, "a client missed the kill"
    with serving(folder / "bundle", *PATIENT, "--port", server.port) as again:
        assert again.port == server.port
        with _clients(again) as clients:
            pass
        answers = clients.join(stop=True)
        check_texts(answers, expected)
        assert all(one.complete for one in answers), "an answer after the restart is incomplete"
    return "completed"


def terminated(folder: Path, draw: random.Random) -> str:
    """SIGTERM while all clients stream: started streams complete, new requests are refused."""
    with serving(folder / "bundle", *PATIENT) as server:
        expected = _expected_texts(server)
        with _clients(server) as clients:
            time.sleep(draw.random())
            signaled = time.monotonic()
            server.signal()
        answers = clients.join()
        assert server.wait() == 0, "the server aborted a request"
    check_texts(answers, expected)
    for one in answers:
        if one.status == 200:
            assert one.complete, "a started stream broke off"
        elif one.status is None:
            assert one.started > signaled, "a request from before the signal was lost"
        else:
            assert one.status == 503, one
            assert (one.refusal["code"], one.refusal["type"]) == ("draining", "server_error")
            assert int(one.refusal["retry_after"]) >= 1
    assert any(one.status == 503 for one in answers), "no request arrived during the drain"
    return "completed"


def misbehaving_clients(folder: Path, draw: random.Random) -> str:
    """Clients stall, vanish, dawdle and send too much; well-behaved clients are unaffected."""
    options = ("--rows", 2 * CLIENTS, *FREE, *IMPATIENT)
    with serving(folder / "bundle", *options, program=SMALL_BUFFERS) as server:
        expected = _expected_texts(server)
        with _clients(server) as clients:
            bad = [
                _ClientThread(one, server, random.Random(draw.random()))  # noqa: S311
                for one in MISBEHAVING
            ]
            for one in bad:
                one.join(PATIENCE_S)
                assert not one.is_alive(), f"the server never disconnected {one.name}"
        answers = clients.join(stop=True)
        faults = {one.name: one.fault for one in bad if one.fault is not None}
        assert not faults, faults
        check_texts(answers, expected)
        assert all(one.complete for one in answers), "a well-behaved client's stream broke off"
        idle(server)
        assert server.ask("/ready").status == 200
    return "completed"


@contextmanager
def _clients(server: Server) -> Iterator[Clients]:
    """Start clients and wait until they use all rows of the server."""
    clients = Clients(server.port)
    until(lambda: server.metric("running_rows") >= ROWS, "rows in use")
    yield clients


def _expected_texts(server: Server) -> dict[str, str]:
    """The answer to every prompt, each requested from the idle server."""
    found = {}
    for prompt in PROMPTS:
        answer = ask(server.port, prompt)
        assert answer.complete, answer
        found[prompt] = answer.text
    return found


def check_texts(answers: list[Answer], expected: dict[str, str]) -> None:
    """Assert that complete texts equal the expected ones and incomplete texts are prefixes."""
    for one in answers:
        assert one.status != 200 or not one.refusal, f"an error in a stream: {one.refusal}"
        whole = expected[one.prompt]
        good = one.text == whole if one.complete else whole.startswith(one.text)
        assert good, f"{one.text!r} differs from the text of the request alone, {whole!r}"


# Misbehaving clients. Each asserts how the server gets rid of it.


def leaves_a_stream(server: Server, draw: random.Random) -> None:
    """Read a little, then disconnect, with or without a reset."""
    with closing(server.connection(STREAM)) as connection:
        begun(connection)
        time.sleep(draw.random() / 4)
        if draw.random() < 0.5:
            linger = struct.pack("ii", 1, 0)  # close with a reset
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


def leaves_before_its_answer(server: Server, draw: random.Random) -> None:
    """Disconnect while the server computes a non-streamed answer."""
    with closing(server.connection(ENDLESS)):
        time.sleep(draw.random() / 4)


def stops_reading(server: Server, _draw: random.Random) -> None:
    """Request a long stream and read none of it."""
    with closing(server.connection(STREAM | {"logprobs": 20})) as connection:
        connection.settimeout(PATIENCE_S)
        time.sleep(2)
        assert b"[DONE]" not in rest(connection)


def sends_half_a_head(server: Server, draw: random.Random) -> None:
    """Send an incomplete head byte by byte, on a new connection or after a complete request."""
    with _connected(server) as connection:
        if draw.random() < 0.5:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: test\r\n\r\n")
            while not connection.recv(1 << 14).endswith(b"}"):
                pass
        _drip(connection, b"POST /v1/completions HTTP/1.1\r\n" + b"X" * 500)
        assert rest(connection) == b""


def sends_half_a_body(server: Server, _draw: random.Random) -> None:
    """Announce a longer body than is sent."""
    with _connected(server) as connection:
        connection.sendall(_head(1000) + b"{")
        assert rest(connection).startswith(b"HTTP/1.1 408")


def sends_too_much(server: Server, draw: random.Random) -> None:
    """Send a body of up to 5 MB."""
    size = draw.randrange(100_000, 5_000_000)
    with _connected(server) as connection:
        connection.sendall(_head(size) + b" " * size)
        assert rest(connection).startswith(b"HTTP/1.1 413")


def sends_no_http(server: Server, draw: random.Random) -> None:
    """Send random bytes."""
    with _connected(server) as connection:
        connection.sendall(draw.randbytes(200) + b"\r\n\r\n")
        assert rest(connection).startswith(b"HTTP/1.1 400")


MISBEHAVING: tuple[Callable[[Server, random.Random], None], ...] = (
    leaves_a_stream, leaves_a_stream, leaves_before_its_answer, leaves_before_its_answer,
    stops_reading, sends_half_a_head, sends_half_a_head, sends_half_a_body, sends_too_much,
    sends_no_http,
)  # fmt: skip


class _ClientThread(threading.Thread):
    """Runs one misbehaving client; `fault` is the exception that it raised, if any."""

    def __init__(
        self, client: Callable[[Server, random.Random], None], server: Server, draw: random.Random
    ) -> None:
        super().__init__(name=client.__name__)
        self.fault: BaseException | None = None
        self._client, self._server, self._draw = client, server, draw
        self.start()

    def run(self) -> None:
        try:
            self._client(self._server, self._draw)
        except BaseException as error:
            self.fault = error


@contextmanager
def _connected(server: Server) -> Iterator[socket.socket]:
    with closing(socket.create_connection((server.host, server.port), PATIENCE_S)) as connection:
        yield connection


def _head(length: int) -> bytes:
    return (
        "POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\nConnection: close\r\n\r\n"
    ).encode()


def _drip(connection: socket.socket, data: bytes) -> None:
    """Send one byte at a time until the server closes the connection."""
    try:
        for byte in data:
            connection.sendall(bytes([byte]))
            time.sleep(0.05)
    except OSError:
        return
    raise AssertionError("the server waited for the whole head")


TRIALS = (
    Trial(name="server under load, killed and restarted", prepare=inputs, run_once=killed),
    Trial(name="server under load, SIGTERM", prepare=inputs, run_once=terminated),
    Trial(
        name="server, clients that stall, vanish and send too much",
        prepare=inputs,
        run_once=misbehaving_clients,
    ),
)
