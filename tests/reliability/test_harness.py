"""The harness reports faults: each check fails when it should."""

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graphs.errors import MistralcError
from tests.reliability.harness.fuzz import Counts
from tests.reliability.harness.guard import outcome_of
from tests.reliability.harness.target import Folder
from tests.reliability.targets import server
from tests.reliability.trials import servers


def test_counts_survive_the_transfer_to_the_parent_process() -> None:
    counts = Counts(cases=2, read=1, faults=Counter({"where": 1}), examples={"where": "what"})
    assert Counts(**json.loads(json.dumps(counts.to_json()))) == counts


def test_a_reader_that_raises_any_other_exception_is_a_fault() -> None:
    with pytest.raises(KeyError):
        outcome_of(lambda: {}["no such key"], 1)


def test_a_reader_that_uses_memory_out_of_proportion_is_a_fault() -> None:
    with pytest.raises(AssertionError, match="bytes of memory"):
        outcome_of(lambda: print(len(bytearray(os.urandom(1)) * (200 << 20))), 10)


def test_a_reader_that_allocates_a_terabyte_is_a_fault() -> None:
    with pytest.raises(MemoryError):
        outcome_of(lambda: print(len(bytearray(1 << 40))), 10)


@pytest.mark.parametrize("message", ["no", "an explanation that breaks off in the"])
def test_a_refusal_with_an_unreadable_message_is_a_fault(message: str) -> None:
    def refuse() -> None:
        raise MistralcError(message)

    with pytest.raises(AssertionError):
        outcome_of(refuse, 1)


def test_a_response_that_contradicts_the_request_is_a_fault() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12,
             "prompt_tokens_details": {"cached_tokens": 0}}  # fmt: skip
    server.check_usage(usage, 1, 9)
    with pytest.raises(AssertionError, match="9 tokens"):
        server.check_usage(usage, 1, 8)
    body = {"prompt": "x", "stop": "b", "max_tokens": 2}
    for text, reason in (("abc", "length"), ("ac", "cancelled")):
        choice = server.Choice(text, reason, None)
        with pytest.raises(AssertionError):
            server.check_choices([choice], body, chat=False)
    with pytest.raises(AssertionError):
        server.error_message(server.Response(422, "application/json", b'{"detail": []}'))


def test_a_truncated_stream_must_be_a_prefix_and_a_complete_one_equal() -> None:
    answers = [servers.Answer(prompt="x", started=0, status=200, text="ab")]
    servers.check_texts(answers, {"x": "abc"})
    for right in ("", "acb"):
        with pytest.raises(AssertionError, match="alone"):
            servers.check_texts(answers, {"x": right})
    answers[0].complete = True
    with pytest.raises(AssertionError, match="alone"):
        servers.check_texts(answers, {"x": "abc"})


def test_each_case_starts_from_the_valid_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"good")
    folder = Folder(tmp_path)
    read: list[dict[str, bytes]] = []
    run: Callable[[Any], None] = folder.reader(
        lambda path: read.append({file.name: file.read_bytes() for file in path.iterdir()})
    )
    for case in ({"a": b"bad", "b": b"new"}, {}):
        run(case)
    assert read == [{"a": b"bad", "b": b"new"}, {"a": b"good"}]
