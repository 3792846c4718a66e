"""A server under load that is killed, told to end, or has clients of the worst kind.

What clients saw is compared with the same request alone: an answer may break off, but what came of
it has to be its beginning.
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

from tests.reliability.trial import Trial
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

CLIENTS, ROWS = 8, 4  # so that some wait
TOKENS = 60
PROMPTS = ("The ring", "A window slides.", "What is kept", "é, and more", "Once", "1 2 3 4 5")
PATIENT = ("--rows", ROWS, *FREE)


@dataclass(slots=True, kw_only=True)
class Seen:
    """What one client saw of one streamed answer. `status` is None where none came."""

    prompt: str
    began: float
    status: int | None = None
    text: str = ""
    whole: bool = False
    refusal: dict[str, Any] = field(default_factory=dict)


def ask(port: int, prompt: str) -> Seen:
    """Ask for a stream of `TOKENS` greedy tokens and take what comes, however it ends."""
    body = {"model": "tiny", "prompt": prompt, "stream": True, "temperature": 0,
            "max_tokens": TOKENS, "logit_bias": NO_END}  # fmt: skip
    seen = Seen(prompt=prompt, began=time.monotonic())
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    with closing(connection):
        try:
            connection.request(
                "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
            )
            response = connection.getresponse()
            seen.status = response.status
            if response.status != 200:
                seen.refusal = json.loads(response.read())["error"]
                seen.refusal["retry_after"] = response.headers["Retry-After"]
                return seen
            for line in response:
                _take(seen, line)
        except (OSError, http.client.HTTPException):
            pass  # it broke off: `whole` is not set
    return seen


def _take(seen: Seen, line: bytes) -> None:
    """Add one line of the stream, which a server that was killed may have left unfinished."""
    if not line.endswith(b"\n") or not line.strip():
        return
    told = line.decode("ascii").strip().removeprefix("data: ")
    if told == "[DONE]":
        seen.whole = True
        return
    event = json.loads(told)
    seen.refusal = event.get("error", {})
    seen.text += "".join(choice["text"] for choice in event.get("choices", ()))


class Crowd:
    """Clients that ask again and again, each in a thread, until they are stopped or refused."""

    def __init__(self, port: int) -> None:
        self.seen: list[Seen] = []
        self._port, self._stop = port, threading.Event()
        self._threads = [
            threading.Thread(target=self._one, args=(number,)) for number in range(CLIENTS)
        ]
        for thread in self._threads:
            thread.start()

    def _one(self, number: int) -> None:
        while not self._stop.is_set():
            seen = ask(self._port, PROMPTS[number % len(PROMPTS)])
            self.seen.append(seen)
            if not seen.whole:
                return
            number += 1

    def ended(self, *, stop: bool = False) -> list[Seen]:
        """Everything that was seen, once all have ended; `stop` after the answers under way."""
        if stop:
            self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "a client still waits for its answer"
        return self.seen


def inputs(folder: Path) -> None:
    """A bundle with a layer that slides over 8 tokens and one that does too, without end."""
    write_checkpoint(folder / "checkpoint", tiny_spec(window=8))
    words = ("export", str(folder / "checkpoint"), "-o", str(folder / "bundle"), "--quiet")
    subprocess.run([sys.executable, "-m", "mistralc", *words], cwd=ROOT, check=True)


def killed(folder: Path, draw: random.Random) -> str:
    """`kill -9` while all clients stream; then the same port, the same clients."""
    with serving(folder / "bundle", *PATIENT) as server:
        alone = _alone(server)
        with _crowd(server) as crowd:
            time.sleep(draw.random())
            server.signal(signal.SIGKILL)
            assert server.wait() == -signal.SIGKILL
        seen = crowd.ended()
    _check_texts(seen, alone)
    assert all(one.status in (200, None) for one in seen), "a status of a server that was dead"
    assert sum(not one.whole for one in seen) == CLIENTS, "someone did not notice"
    with serving(folder / "bundle", *PATIENT, "--port", server.port) as again:
        assert again.port == server.port
        with _crowd(again) as crowd:
            pass
        seen = crowd.ended(stop=True)
        _check_texts(seen, alone)
        assert all(one.whole for one in seen), "not everyone was answered after the restart"
    return "completed"


def told_to_end(folder: Path, draw: random.Random) -> str:
    """SIGTERM while all clients stream: what had begun ends whole, what is new is refused."""
    with serving(folder / "bundle", *PATIENT) as server:
        alone = _alone(server)
        with _crowd(server) as crowd:
            time.sleep(draw.random())
            told = time.monotonic()
            server.signal()
        seen = crowd.ended()
        assert server.wait() == 0, "it cut something off"
    _check_texts(seen, alone)
    for one in seen:
        if one.status == 200:
            assert one.whole, "an answer that had begun broke off"
        elif one.status is None:
            assert one.began > told, "a request from before the signal was lost"
        else:
            assert one.status == 503, one
            assert (one.refusal["code"], one.refusal["type"]) == ("draining", "server_error")
            assert int(one.refusal["retry_after"]) >= 1
    assert any(one.status == 503 for one in seen), "nobody asked while it drained"
    return "completed"


def crowded(folder: Path, draw: random.Random) -> str:
    """Clients that stall, vanish, dawdle and send too much, among others that notice nothing."""
    options = ("--rows", 2 * CLIENTS, *FREE, *IMPATIENT)
    with serving(folder / "bundle", *options, program=SMALL_BUFFERS) as server:
        alone = _alone(server)
        with _crowd(server) as crowd:
            bad = [_Thread(one, server, random.Random(draw.random())) for one in BAD]  # noqa: S311
            for one in bad:
                one.join(PATIENCE_S)
                assert not one.is_alive(), f"{one.name} was never got rid of"
        seen = crowd.ended(stop=True)
        faults = {one.name: one.fault for one in bad if one.fault is not None}
        assert not faults, faults
        _check_texts(seen, alone)
        assert all(one.whole for one in seen), "someone else's answer broke off"
        idle(server)
        assert server.ask("/ready").status == 200
    return "completed"


@contextmanager
def _crowd(server: Server) -> Iterator[Crowd]:
    """Clients at work, all rows of the server in use."""
    crowd = Crowd(server.port)
    until(lambda: server.metric("running_rows") >= ROWS, "rows in use")
    yield crowd


def _alone(server: Server) -> dict[str, str]:
    """Every prompt's answer while nobody else asks."""
    found = {}
    for prompt in PROMPTS:
        seen = ask(server.port, prompt)
        assert seen.whole, seen
        found[prompt] = seen.text
    return found


def _check_texts(seen: list[Seen], alone: dict[str, str]) -> None:
    for one in seen:
        assert one.status != 200 or not one.refusal, f"an error in a stream: {one.refusal}"
        right = alone[one.prompt]
        good = one.text == right if one.whole else right.startswith(one.text)
        assert good, f"{one.text!r} is not what the request gets alone, {right!r}"


# Clients of the worst kind: each asserts how it is got rid of


def leaves_a_stream(server: Server, draw: random.Random) -> None:
    """Reads a little, then is gone, with a reset or without."""
    with closing(server.connection(STREAM)) as connection:
        begun(connection)
        time.sleep(draw.random() / 4)
        if draw.random() < 0.5:
            linger = struct.pack("ii", 1, 0)  # close with a reset
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


def leaves_before_its_answer(server: Server, draw: random.Random) -> None:
    """Is gone while its whole answer is made."""
    with closing(server.connection(ENDLESS)):
        time.sleep(draw.random() / 4)


def stops_reading(server: Server, _draw: random.Random) -> None:
    """Asks for much and takes none of it."""
    with closing(server.connection(STREAM | {"logprobs": 20})) as connection:
        connection.settimeout(PATIENCE_S)
        time.sleep(2)
        assert b"[DONE]" not in rest(connection)


def sends_half_a_head(server: Server, draw: random.Random) -> None:
    """On a connection of its own or after a whole request, byte by byte or not."""
    with _connected(server) as connection:
        if draw.random() < 0.5:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: test\r\n\r\n")
            while not connection.recv(1 << 14).endswith(b"}"):
                pass
        _drip(connection, b"POST /v1/completions HTTP/1.1\r\n" + b"X" * 500)
        assert rest(connection) == b""


def sends_half_a_body(server: Server, _draw: random.Random) -> None:
    """Announces more than comes."""
    with _connected(server) as connection:
        connection.sendall(_head(1000) + b"{")
        assert rest(connection).startswith(b"HTTP/1.1 408")


def sends_too_much(server: Server, draw: random.Random) -> None:
    """A body of megabytes."""
    size = draw.randrange(100_000, 5_000_000)
    with _connected(server) as connection:
        connection.sendall(_head(size) + b" " * size)
        assert rest(connection).startswith(b"HTTP/1.1 413")


def sends_no_http(server: Server, draw: random.Random) -> None:
    """Bytes of no meaning."""
    with _connected(server) as connection:
        connection.sendall(draw.randbytes(200) + b"\r\n\r\n")
        assert rest(connection).startswith(b"HTTP/1.1 400")


BAD: tuple[Callable[[Server, random.Random], None], ...] = (
    leaves_a_stream, leaves_a_stream, leaves_before_its_answer, leaves_before_its_answer,
    stops_reading, sends_half_a_head, sends_half_a_head, sends_half_a_body, sends_too_much,
    sends_no_http,
)  # fmt: skip


class _Thread(threading.Thread):
    """One bad client at work. `fault` is what it met that it should not have."""

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
    """Send a byte at a time until there are none, or the server has had enough."""
    try:
        for byte in data:
            connection.sendall(bytes([byte]))
            time.sleep(0.05)
    except OSError:
        return
    raise AssertionError("the server waited for all of it")


TRIALS = (
    Trial(name="server under load, killed and restarted", prepare=inputs, hurt=killed),
    Trial(name="server under load, SIGTERM", prepare=inputs, hurt=told_to_end),
    Trial(
        name="server, clients that stall, vanish and send too much", prepare=inputs, hurt=crowded
    ),
)
