"""Clients that disconnect, stall, ask for too much or have no key, and a server that is stopped.

Each test uses a real server process. The model's window slides without end, so a request runs until
something ends it.
"""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import openai
import pytest

from runtime.serve.settings import Limits
from tests.conftest import Command
from tests.support.serving import (
    ENDLESS,
    FREE,
    IMPATIENT,
    NO_END,
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

LIMITS = Limits()
ENDED = 'requests_total{path="/v1/completions",status="200"}'


@pytest.fixture(scope="module")
def server(sliding_bundle: Path) -> Iterator[Server]:
    """A server that cuts off clients which do not read for a second."""
    with serving(
        sliding_bundle, "--rows", 2, "--max-waiting", 1, *IMPATIENT, *FREE, program=SMALL_BUFFERS
    ) as running:
        yield running


@contextmanager
def both_rows_taken(server: Server) -> Iterator[None]:
    """Run two endless requests, started one after the other because only one may wait."""
    with closing(server.connection(ENDLESS)):
        until(lambda: server.metric("running_rows") == 1, "a row in use")
        with closing(server.connection(ENDLESS)):
            until(lambda: server.metric("running_rows") == 2, "two rows in use")
            yield


# Clients that disconnect


def test_a_client_that_disconnects_from_a_stream_frees_its_row(server: Server) -> None:
    gone = server.metric(ENDED)
    with closing(server.connection(STREAM)) as connection:
        begun(connection)
        until(lambda: server.metric("running_rows") == 1, "a row in use")
    idle(server)
    steps = server.metric("generated_tokens_total")
    assert server.metric("generated_tokens_total") == steps, "tokens were generated for nobody"
    until(
        lambda: server.metric(ENDED) == gone + 1,
        "the end of the request",
    )


def test_a_client_that_disconnects_before_its_whole_answer_frees_its_row(server: Server) -> None:
    left = server.metric('requests_total{path="/v1/completions",status="499"}')
    with closing(server.connection(ENDLESS)):
        until(lambda: server.metric("running_rows") == 1, "a row in use")
    idle(server)
    until(
        lambda: server.metric('requests_total{path="/v1/completions",status="499"}') == left + 1,
        "the request's end with status 499",
    )


def test_a_client_that_disconnects_while_waiting_leaves_the_queue(server: Server) -> None:
    with both_rows_taken(server):
        with closing(server.connection(ENDLESS)):
            until(lambda: server.metric("waiting_requests") == 1, "a waiting request")
        until(lambda: server.metric("waiting_requests") == 0, "an empty queue")
    idle(server)


def test_closing_the_stream_of_openais_client_frees_the_row(server: Server) -> None:
    client = server.client()
    stream = client.completions.create(model="tiny", prompt="The ring", **STREAM)
    next(iter(stream))
    stream.close()
    idle(server)


# Clients that take more than their share


def test_a_full_queue_is_a_429_with_retry_after(server: Server) -> None:
    with both_rows_taken(server), closing(server.connection(ENDLESS)):
        until(lambda: server.metric("waiting_requests") == 1, "a waiting request")
        refused = server.complete(max_tokens=1)
        assert refused.status == 429
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        with pytest.raises(openai.RateLimitError):
            server.client().completions.create(model="tiny", prompt="x", max_tokens=1)
    idle(server)


def test_a_refusal_of_one_choice_cancels_the_others(server: Server) -> None:
    assert (
        server.complete(n=16, **ENDLESS).status == 429
    )  # there are two rows and one place in the queue
    idle(server)


def test_a_client_that_does_not_read_is_cut_off_and_delays_nobody(server: Server) -> None:
    few = LIMITS.buffered_tokens // 2  # all fit into the buffer, so the time ends it
    ended = server.metric(ENDED)
    alone = server.complete(max_tokens=20, logit_bias=NO_END).json()["choices"]
    with closing(server.connection(STREAM | {"max_tokens": few, "logprobs": 20})) as stalled:
        until(lambda: server.metric("running_rows") == 1, "a row in use")
        beside = server.complete(max_tokens=20, logit_bias=NO_END)
        assert beside.json()["choices"] == alone
        until(
            lambda: server.metric(ENDED) == ended + 3,
            "its end, though it neither read nor disconnected",
        )
        _is_half_an_answer(rest(stalled))


def test_a_client_with_too_much_unread_text_is_cut_off_before_its_time(
    sliding_bundle: Path,
) -> None:
    with (
        serving(sliding_bundle, "--stall-seconds", 600, *FREE, program=SMALL_BUFFERS) as server,
        closing(server.connection(STREAM | {"logprobs": 20})) as stalled,
    ):
        until(lambda: server.metric(ENDED) == 1, "its end, though it neither read nor disconnected")
        idle(server)
        _is_half_an_answer(rest(stalled))


def _is_half_an_answer(data: bytes) -> None:
    assert data.startswith(b"HTTP/1.1 200 OK")
    assert b"[DONE]" not in data


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_a_413(server: Server, chunked: bool) -> None:
    body = json.dumps({"model": "tiny", "prompt": "a" * 5_000_000}).encode()
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
    head = f"POST /v1/completions HTTP/1.1\r\nHost: t\r\n{length}\r\nConnection: close\r\n"
    sent = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if chunked else body
    with closing(socket.create_connection((server.host, server.port), 60)) as connection:
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + sent)
        answer = rest(connection)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"50000 bytes" in answer


def test_a_body_that_does_not_arrive_is_a_408(server: Server) -> None:
    head = "POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Length: 9\r\nConnection: close\r\n"
    with closing(socket.create_connection((server.host, server.port), 60)) as connection:
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n{")
        assert rest(connection).startswith(b"HTTP/1.1 408")


def test_a_connection_without_a_request_is_closed(server: Server) -> None:
    with closing(socket.create_connection((server.host, server.port), 60)) as connection:
        connection.sendall(b"POST /v1/comp")
        assert rest(connection) == b""


@pytest.mark.parametrize(
    ("more", "begun"),
    [(b"", b"POST /v1/comp"), (b"Content-Length: 9\r\n", b"{")],
    ids=["half a head", "half a body that nobody wants"],
)
def test_a_used_connection_without_a_further_request_is_closed(
    server: Server, more: bytes, begun: bytes
) -> None:
    with closing(socket.create_connection((server.host, server.port), 60)) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: test\r\n" + more + b"\r\n")
        answer = b""
        while not answer.endswith(b'{"status":"ok"}'):
            answer += connection.recv(1 << 14)
        connection.sendall(begun)  # this stops uvicorn's own timeout
        assert rest(connection) == b""


def test_an_answer_that_takes_too_long_is_a_504_or_an_error_in_its_stream(
    sliding_bundle: Path,
) -> None:
    with serving(sliding_bundle, "--rows", 2, "--timeout-seconds", 1, *FREE) as server:
        whole = server.complete(**ENDLESS)
        assert (whole.status, whole.json()["error"]["code"]) == (504, "timeout")
        stream = server.client().completions.create(model="tiny", prompt="x", **STREAM)
        with pytest.raises(openai.APIError, match="was not complete after 1 s"):
            list(stream)
        idle(server)


# Keys


def test_only_clients_with_a_key_are_served(sliding_bundle: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# ours\nfirst-key\n\nsecond-key\n")
    with serving(sliding_bundle, "--api-key-file", keys) as server:
        for path in ("/", "/health", "/ready"):
            assert server.ask(path).status == 200
        for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/nothing"):
            refused = server.ask(path)
            assert (refused.status, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
            assert server.ask(path, Authorization="Basic first-key").status == 401
            assert server.ask(path, Authorization="Bearer first-ke").status == 401
            assert server.ask(path, Authorization="Bearer ").status == 401
        for key in ("first-key", "second-key"):
            assert server.client(key).models.list().data[0].id == "tiny"
        with pytest.raises(openai.AuthenticationError):
            server.client("ours").completions.create(model="tiny", prompt="x")
        assert "mistralc_rows 8.0" in server.ask("/metrics", Authorization="Bearer first-key").text


def test_keys_come_from_the_environment_too(sliding_bundle: Path) -> None:
    with serving(sliding_bundle, MISTRALC_API_KEYS="one two") as server:
        assert server.ask("/v1/models").status == 401
        assert server.client("two").models.list().data[0].id == "tiny"


# Stopping


def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(sliding_bundle: Path) -> None:
    with serving(sliding_bundle, "--rows", 3, *FREE) as server:
        expected = server.complete(max_tokens=500, logit_bias=NO_END).json()["choices"][0]["text"]
        asked = STREAM | {"max_tokens": 500}
        with (
            closing(server.connection(ENDLESS)) as last,
            closing(server.connection(asked)) as one,
            closing(server.connection(asked)) as two,
        ):
            begins = begun(one), begun(two)
            server.signal()
            until(lambda: server.ask("/ready").status == 503, "draining")
            assert server.ask("/ready").json() == {"status": "draining"}
            assert server.ask("/health").status == 200
            refused = server.complete(max_tokens=1)
            assert refused.status == 503
            assert int(refused.headers["Retry-After"]) >= 1
            for begin, connection in zip(begins, (one, two), strict=True):
                assert _text(begin + rest(connection)) == expected
            assert server.ask("/ready").json() == {
                "status": "draining"
            }  # answered for the last time
            last.close()
            assert server.wait() == 0


def test_requests_that_outlast_the_drain_get_an_error_and_are_cut_off(sliding_bundle: Path) -> None:
    with (
        serving(sliding_bundle, "--drain-seconds", 0.5, *FREE) as server,
        closing(server.connection(STREAM)) as connection,
    ):
        begin = begun(connection)
        server.signal(signal.SIGINT)
        data = begin + rest(connection)
        assert b'"message":"The server is shutting down' in data
        assert server.wait() == 1


def test_a_second_signal_ends_the_server_at_once(sliding_bundle: Path) -> None:
    with (
        serving(sliding_bundle, "--drain-seconds", 600, *FREE) as server,
        closing(server.connection(ENDLESS)),
    ):
        until(lambda: server.metric("running_rows") == 1, "a row in use")
        server.signal()
        until(lambda: server.ask("/ready").status == 503, "draining")
        server.signal()
        assert server.wait() == -signal.SIGTERM


def test_an_idle_server_ends_at_sigterm(sliding_bundle: Path) -> None:
    with serving(sliding_bundle) as server:
        server.signal()
        assert server.wait() == 0


# The command


def test_a_bundle_that_cannot_be_served_ends_the_command(mistralc: Command, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mistralc", "serve", str(tmp_path / "none"), "--port", "0"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "There is no bundle at" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_an_error_message(mistralc: Command, sliding_bundle: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        ended = mistralc("serve", sliding_bundle, "--port", taken.getsockname()[1])
    assert ended.code == 1
    assert "cannot listen" in ended.err


def test_a_file_without_keys_is_refused(
    mistralc: Command, sliding_bundle: Path, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# none yet\n")
    ended = mistralc("serve", sliding_bundle, "--api-key-file", keys)
    assert ended.code == 2
    assert "no API key" in ended.err


BROKEN = """
import sys
import runtime.serve.service as service
import mistralc

load = service.load

def broken(*args, **options):
    loaded = load(*args, **options)
    step, left = loaded.session.step, [20]
    def fail(*args, **options):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("the device is lost")
        return step(*args, **options)
    loaded.session.step = fail
    return loaded

service.load = broken
mistralc.main()
"""


def test_a_failed_backend_is_reported_to_clients_and_by_health(
    sliding_bundle: Path, tmp_path: Path
) -> None:
    program = tmp_path / "broken.py"
    program.write_text(BROKEN)
    with serving(sliding_bundle, *FREE, program=(str(program),), PYTHONPATH=str(ROOT)) as server:
        assert server.ask("/health").status == 200
        failed = server.complete(**ENDLESS)
        assert failed.status == 500
        assert "the device is lost" in failed.json()["error"]["message"]
        for path in ("/health", "/ready"):
            assert server.ask(path).status == 503
            assert server.ask(path).json() == {"status": "failed"}
        assert server.complete(max_tokens=1).status == 503
        server.signal()
        assert server.wait() == 1


def _text(response: bytes) -> str:
    """Return the text of a streamed completion from the bytes of its response."""
    body = response.partition(b"\r\n\r\n")[2]
    data = b""
    while body:  # chunked: a size in hexadecimal, then that many bytes
        size, _, body = body.partition(b"\r\n")
        data += body[: int(size, 16)]
        body = body[int(size, 16) + 2 :]
    events = [event.removeprefix("data: ") for event in data.decode().split("\n\n")]
    assert events[-2:] == ["[DONE]", ""]
    return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-2])
