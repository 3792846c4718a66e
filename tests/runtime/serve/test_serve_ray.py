"""Two replicas behind Ray's proxy: the same answers, and a killed replica affects no other.

A real Ray in a process of its own (tests/support/cluster/ray_host.py), on tiny bundles. Skipped
where the extra `ray` is not installed, as in `dev`.
"""

import contextlib
import os
import re
import select
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from runtime.serve.settings import Limits
from tests.support.serving import NO_END, PATIENCE_S, ROOT, Server, until

pytest.importorskip("ray", reason="Ray is not installed: pip install 'mistralc[ray]'")

DOCUMENT = ROOT / "docs" / "cluster.md"
HEADER = "mistralc-replica"
ENDLESS: dict[str, Any] = {"model": "tiny", "prompt": "The ring", "max_tokens": 1_000_000,
                           "logit_bias": NO_END, "temperature": 0}  # fmt: skip
ENVIRONMENT = os.environ | {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # otherwise it leaves a token in the user's home
    "PYTHONPATH": str(ROOT),
}
STREAM_S = 15.0  # duration of a stream that must outlast a replica's start: 3 to 6 s


class Cluster(Server):
    """Ray Serve on one node. `address` is for Ray's commands."""

    def __init__(self, process: "subprocess.Popen[str]", url: str, address: str) -> None:
        super().__init__(process, url, "tiny")
        self.address = address

    def replicas(self) -> list[psutil.Process]:
        """Return the processes of the replicas."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if " ".join(process.cmdline()).startswith("ray::ServeReplica"):
                    found.append(process)
        return found

    def names(self, count: int = 16) -> set[str]:
        """Return the replicas that answer `count` requests."""
        return {self.ask("/ready").headers[HEADER] for _ in range(count)}


class Stream:
    """A streamed completion, read in a thread."""

    def __init__(self, cluster: Cluster, **options: Any) -> None:
        client = cluster.client()
        raw = client.completions.with_raw_response.create(**ENDLESS | {"stream": True} | options)
        self.replica = raw.headers[HEADER]
        self.text, self.reason = "", ""
        self.error: Exception | None = None
        self._stream = raw.parse()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for chunk in self._stream:
                self.text += chunk.choices[0].text
                self.reason = chunk.choices[0].finish_reason or self.reason
        except Exception as error:
            self.error = error

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def close(self) -> None:
        self._stream.close()


def await_serving(process: "subprocess.Popen[str]") -> str:
    """Read the host's output, Ray's messages included, until it serves; returns Ray's address."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("serving "):
            return line.split()[1]
    raise RuntimeError(f"Ray ended with {process.wait()} before it served")


def free_port() -> int:
    """Return a free port; Ray does not accept port 0."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def cluster(sliding_bundle: Path) -> Iterator[Cluster]:
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "tests.support.cluster.ray_host",
        str(sliding_bundle),
        str(port),
    ]
    with subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        family: list[psutil.Process] = []
        try:
            address = await_serving(process)
            yield Cluster(process, f"http://127.0.0.1:{port}", address)
            family = psutil.Process(process.pid).children(recursive=True)
            process.stdin.close()
            process.wait(60)
        finally:
            process.kill()
            for one in family:  # processes that should have ended with Ray
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()


@pytest.fixture
def streams(cluster: Cluster) -> Iterator[Callable[..., list[Stream]]]:
    """`streams(**options)` starts one on each replica."""
    opened: list[Stream] = []

    def one_on_each(**options: Any) -> list[Stream]:
        by_replica: dict[str, Stream] = {}
        for _ in range(4):
            stream = Stream(cluster, **options)
            opened.append(stream)
            if stream.replica in by_replica:
                stream.close()
            by_replica.setdefault(stream.replica, stream)
            if len(by_replica) == 2:
                return list(by_replica.values())
        raise AssertionError("the proxy sends everything to one replica")

    yield one_on_each
    for stream in opened:
        stream.close()


def running_rows(cluster: Cluster) -> dict[str, float]:
    """Rows in use by replica: of both while they are equally busy, else of the less busy.

    That is whom the proxy asks.
    """
    rows = {}
    for _ in range(16):
        answer = cluster.ask("/metrics")
        (line,) = [x for x in answer.text.splitlines() if x.startswith("mistralc_running_rows ")]
        rows[answer.headers[HEADER]] = float(line.rpartition(" ")[2])
    return rows


def tokens_in(streams: Callable[..., list[Stream]], seconds: float) -> int:
    """About how many tokens a stream on each replica has in that time here and now."""
    began = time.monotonic()
    pair = streams(max_tokens=1000)
    until(lambda: all(stream.ended for stream in pair), "the end of both streams")
    return int(1000 * seconds / (time.monotonic() - began))


def test_paths_answers_and_errors_equal_those_of_one_server(cluster: Cluster) -> None:
    assert cluster.ask("/health").json() == {"status": "ok"}
    assert cluster.ask("/ready").json() == {"status": "ready"}
    assert cluster.ask("/v1/models").json()["data"][0]["id"] == "tiny"
    client = cluster.client()
    whole = client.completions.create(model="tiny", prompt="The ring", max_tokens=20, temperature=0)
    pieces = client.completions.create(
        model="tiny", prompt="The ring", max_tokens=20, temperature=0, stream=True
    )
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="suffix"):
        client.completions.create(model="tiny", prompt="x", suffix="y")
    too_large = cluster.complete("x" * (Limits().max_body_bytes + 1))
    assert (too_large.status, too_large.json()["error"]["code"]) == (413, "request_too_large")


def test_requests_go_to_both_replicas(cluster: Cluster) -> None:
    until(lambda: len(cluster.names()) == 2, "an answer from each replica")
    assert len(cluster.replicas()) == 2


def test_a_client_that_disconnects_frees_its_row(
    cluster: Cluster, streams: Callable[..., list[Stream]]
) -> None:
    one, other = streams()
    both = {one.replica: 1, other.replica: 1}
    until(lambda: running_rows(cluster) == both, "a row in use on each replica")
    one.close()
    until(lambda: running_rows(cluster).get(one.replica) == 0, "a free row")
    other.close()
    until(lambda: running_rows(cluster) == dict.fromkeys(both, 0), "no row in use")


def test_a_killed_replica_breaks_only_its_own_streams_and_is_replaced(
    cluster: Cluster, streams: Callable[..., list[Stream]]
) -> None:
    pair = streams()
    before = {stream.replica for stream in pair}
    whole: list[socket.socket] = []
    while min(running_rows(cluster).values()) < 2:  # whole answers, beside the streams
        assert len(whole) < 6, "the proxy sends everything to one replica"
        whole.append(cluster.connection(ENDLESS))
    cluster.replicas()[0].kill()

    answers = [cluster.complete(max_tokens=8, temperature=0) for _ in range(20)]
    assert {answer.status for answer in answers} == {200}, "other requests were affected"
    assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1

    until(lambda: any(stream.ended for stream in pair), "the end of the killed replica's stream")
    (broken,) = [stream for stream in pair if stream.ended]
    (other,) = [stream for stream in pair if not stream.ended]
    assert broken.error is not None, "a stream that was cut off looks complete"
    assert broken.reason == ""
    seen = len(other.text)
    until(lambda: len(other.text) > seen + 100, "more text of the other replica's stream")
    assert other.error is None
    failed, _, _ = select.select(whole, [], [], PATIENCE_S)
    assert 0 < len(failed) < len(whole)
    for connection in failed:
        response = HTTPResponse(connection)
        response.begin()
        assert (response.status, response.headers.get_content_type()) == (500, "text/plain")
    for connection in whole:
        connection.close()

    until(lambda: len(cluster.names() - before) == 1, "an answer from a new replica")
    assert len(cluster.replicas()) == 2


def test_the_documented_command_deploys_a_new_version_and_lets_old_streams_finish(
    cluster: Cluster, streams: Callable[..., list[Stream]], sliding_bundle: Path
) -> None:
    documented = re.findall(r"^\$ (serve run .*)$", DOCUMENT.read_text(encoding="utf-8"), re.M)
    (words,) = map(shlex.split, documented)
    arguments = [f"bundle={sliding_bundle}" if x.startswith("bundle=") else x for x in words[2:]]
    assert arguments != words[2:]
    pair = streams(max_tokens=tokens_in(streams, STREAM_S))
    before = {stream.replica for stream in pair}

    command = [shutil.which("serve", path=Path(sys.executable).parent) or "serve", "run",
               "--non-blocking", "--address", cluster.address, *arguments]  # fmt: skip
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT) as process:
        until(lambda: cluster.names() - before, "an answer from a new replica")
        assert not any(stream.ended for stream in pair), "the streams ended too early for this test"
        until(lambda: all(stream.ended for stream in pair), "the end of both streams")
        assert process.wait(PATIENCE_S) == 0
    assert [stream.error for stream in pair] == [None, None]
    assert [stream.reason for stream in pair] == ["length", "length"]
    until(lambda: len(cluster.names()) == 2, "an answer from each new replica")
    assert not cluster.names() & before
    models = cluster.ask("/v1/models").json()["data"]
    assert [model["id"] for model in models] == [sliding_bundle.name]
