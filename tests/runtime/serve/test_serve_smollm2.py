"""The server on real weights: it answers like the command, and its text makes sense."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from tests.conftest import Command
from tests.support.serving import serving

pytestmark = pytest.mark.smollm2

BUNDLE = Path("build", "smollm2-cpu-fp32")
FRANCE = "What is the capital of France?"


@pytest.fixture(scope="module")
def client(default_build: Path) -> Iterator[OpenAI]:
    with serving(default_build / BUNDLE, "--rows", 4) as server:
        yield server.client()


def ask(client: OpenAI, text: str, **options: Any) -> Any:
    messages: Any = [{"role": "user", "content": text}]
    return client.chat.completions.create(
        model="tiny", messages=messages, **{"max_tokens": 24} | options
    )


def test_every_client_is_told_that_the_capital_of_france_is_paris(
    client: OpenAI, default_build: Path, mistralc: Command
) -> None:
    bundle = default_build / BUNDLE
    command = mistralc("generate", bundle, "--chat", FRANCE, "--quiet").out.strip()
    assert command == "The capital of France is Paris."
    others = [f"Count from {i} to ten." for i in range(1, 6)]
    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(lambda text: ask(client, text), [FRANCE, *others]))
    assert made[0].choices[0].message.content == command
    assert made[0].choices[0].finish_reason == "stop"
    alone = [ask(client, text).choices[0].message.content for text in others]
    assert [answer.choices[0].message.content for answer in made[1:]] == alone


def test_an_answer_under_a_schema_makes_sense(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"capital": {"type": "string", "enum": ["Rome", "Paris", "Oslo"]}},
        "required": ["capital"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    made = ask(client, FRANCE + " Answer as JSON.", response_format=form).choices[0]
    assert json.loads(made.message.content) == {"capital": "Paris"}


def test_no_chunk_splits_a_character(client: OpenAI) -> None:
    stream = client.completions.create(
        model="tiny", prompt="日本の首都は東京です。フランスの首都は", max_tokens=24, stream=True
    )
    pieces = [chunk.choices[0].text for chunk in stream]
    assert any(ord(character) > 0x3000 for piece in pieces for character in piece)
    assert "\ufffd" not in "".join(pieces[:-2]), "a character was cut between chunks"
