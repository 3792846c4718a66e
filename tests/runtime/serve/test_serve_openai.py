"""The server and OpenAI's unmodified client, on a tiny model of random weights."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from runtime.completion import Completion, Limits
from runtime.decoding.sampling import SamplingParams
from runtime.load import load
from tests.conftest import CONTEXT
from tests.support.serving import Server, serving

PROMPT = "The ring turns"
USER: Any = [{"role": "user", "content": "Hello"}]
CITY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["town", "village"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


class City(BaseModel):
    """A schema that a client wants to parse."""

    open: bool
    kind: Literal["town", "village"]


@pytest.fixture(scope="module")
def server(plain_bundle: Path) -> Iterator[Server]:
    with serving(plain_bundle, "--rows", 4, "--max-new-tokens", 64) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return server.client()


@pytest.fixture(scope="module")
def alone(plain_bundle: Path) -> Callable[[str, int], str]:
    """`alone(prompt, n)` is the greedy continuation by the generator, without a server."""
    loaded = load(plain_bundle, threads=1)

    def run(prompt: str, count: int) -> str:
        made = Completion(
            loaded.generator, loaded.tokenizer, loaded.tokenizer.encode(prompt),
            SamplingParams(temperature=0), Limits(max_new_tokens=count),
        )  # fmt: skip
        return "".join(made)

    return run


def complete(client: OpenAI, prompt: Any = PROMPT, **options: Any) -> Any:
    return client.completions.create(model="tiny", prompt=prompt, **{"max_tokens": 12} | options)


def chat(client: OpenAI, messages: Any = USER, **options: Any) -> Any:
    return client.chat.completions.create(
        model="tiny", messages=messages, **{"max_tokens": 12} | options
    )


def test_the_model_is_listed_and_found_by_its_name(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("another")
    assert refused.value.code == "model_not_found"


def test_a_completion_equals_the_generators(
    client: OpenAI, alone: Callable[[str, int], str]
) -> None:
    made = complete(client)
    assert made.choices[0].text == alone(PROMPT, 12)
    assert made.choices[0].finish_reason == "length"
    assert made.usage.completion_tokens == 12
    assert made.usage.total_tokens == made.usage.prompt_tokens + 12


def test_sixteen_simultaneous_requests_are_answered_as_if_alone(
    client: OpenAI, alone: Callable[[str, int], str]
) -> None:
    prompts = [f"{PROMPT} {'and turns ' * (i % 4)}{i}" for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda prompt: complete(client, prompt).choices[0].text, prompts))
    assert made == [alone(prompt, 12) for prompt in prompts]


def test_a_joined_stream_equals_the_whole_answer(client: OpenAI) -> None:
    whole = complete(client)
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}))
    *parts, last = chunks
    assert "".join(chunk.choices[0].text for chunk in parts) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in parts][-1] == "length"
    assert {chunk.choices[0].finish_reason for chunk in parts[:-1]} <= {None}
    assert {chunk.usage for chunk in parts} == {None}
    assert last.choices == []
    assert last.usage.completion_tokens == 12
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_chat_streams_its_role_then_its_text_then_its_finish_reason(client: OpenAI) -> None:
    whole = chat(client)
    assert whole.choices[0].message.role == "assistant"
    first, *parts, last = chat(client, stream=True)
    assert first.choices[0].delta.role == "assistant"
    assert first.choices[0].delta.content == ""
    text = "".join(chunk.choices[0].delta.content for chunk in parts)
    assert text == whole.choices[0].message.content
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.choices[0].delta.content is None


def test_a_stream_ends_with_done(server: Server) -> None:
    answer = server.complete(stream=True, max_tokens=2)
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert all(event.startswith("data: ") for event in events[:-1])
    assert events[-2:] == ["data: [DONE]", ""]


def test_an_answer_can_be_sent_back_as_the_next_message(client: OpenAI) -> None:
    answer = chat(client, max_tokens=4).choices[0].message
    again = chat(client, [*USER, answer.model_dump(), *USER], max_tokens=4)
    assert again.usage.prompt_tokens > 4
    assert chat(client, [*USER, answer, *USER], max_tokens=4).choices == again.choices


def test_a_text_in_parts_is_the_same_text(client: OpenAI) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    split = chat(client, [{"role": "user", "content": parts}])
    assert split.choices == chat(client).choices


def test_text_ends_before_a_stop_string_streamed_or_not(client: OpenAI) -> None:
    whole = complete(client).choices[0].text
    stop = whole[4:7]
    for asked in (stop, ["never", stop]):
        made = complete(client, stop=asked)
        assert made.choices[0].text == whole[: whole.index(stop)]
        assert made.choices[0].finish_reason == "stop"
        assert made.usage.completion_tokens < 12
        chunks = list(complete(client, stop=asked, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole[: whole.index(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_the_same_seed_gives_the_same_text_and_another_another(client: OpenAI) -> None:
    made = [
        complete(client, seed=seed, temperature=1).choices[0].text for seed in (7, 7, 8, -7, -7)
    ]
    assert made[0] == made[1] != made[2]
    assert made[3] == made[4]


def test_each_of_n_choices_has_the_next_seed(client: OpenAI) -> None:
    made = complete(client, n=3, seed=7, temperature=1)
    assert [choice.index for choice in made.choices] == [0, 1, 2]
    single = [complete(client, seed=seed, temperature=1).choices[0].text for seed in (7, 8, 9)]
    assert [choice.text for choice in made.choices] == single
    assert made.usage.completion_tokens == 36
    texts = ["", "", ""]
    for chunk in complete(client, n=3, seed=7, temperature=1, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == single


def test_several_prompts_are_continued_in_order(client: OpenAI) -> None:
    prompts = ["one", "two", "three"]
    made = complete(client, prompts, n=2)
    singles = [complete(client, prompt).choices[0].text for prompt in prompts]
    assert [choice.text for choice in made.choices] == [t for text in singles for t in (text, text)]


def test_token_ids_are_a_prompt(client: OpenAI, plain_bundle: Path) -> None:
    ids = load(plain_bundle, threads=1).tokenizer.encode(PROMPT)
    text = complete(client).choices[0].text
    assert complete(client, ids).choices[0].text == text
    assert [choice.text for choice in complete(client, [ids, ids]).choices] == [text, text]


def test_completions_report_each_tokens_logprob_and_place(client: OpenAI) -> None:
    choice = complete(client, logprobs=3).choices[0]
    scores = choice.logprobs
    assert len(scores.tokens) == 12
    for token, logprob, likely, offset in zip(
        scores.tokens, scores.token_logprobs, scores.top_logprobs, scores.text_offset, strict=True
    ):
        assert logprob == max(likely.values())  # greedy
        assert len(likely) == 3
        assert token.startswith("bytes:") or choice.text[offset:].startswith(token)
    assert complete(client).choices[0].logprobs is None
    joined = [chunk.choices[0] for chunk in complete(client, logprobs=3, stream=True)]
    assert [t for part in joined for t in part.logprobs.tokens] == scores.tokens
    assert [t for part in joined for t in part.logprobs.text_offset] == scores.text_offset


def test_chats_report_each_tokens_logprob_and_bytes(client: OpenAI) -> None:
    choice = chat(client, logprobs=True, top_logprobs=2).choices[0]
    entries = choice.logprobs.content
    data = b"".join(bytes(entry.bytes) for entry in entries)
    assert data.decode(errors="replace").strip() == choice.message.content.strip()
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in entries)  # greedy
    parts = [chunk.choices[0] for chunk in chat(client, logprobs=True, top_logprobs=2, stream=True)]
    assert [e for part in parts if part.logprobs for e in part.logprobs.content] == entries
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_a_stop_strings_tokens_are_not_among_the_logprobs(client: OpenAI) -> None:
    whole = complete(client, logprobs=0).choices[0]
    stop = whole.text[4:7]
    cut = complete(client, logprobs=0, stop=stop).choices[0]
    before = [offset for offset in whole.logprobs.text_offset if offset < len(cut.text)]
    assert cut.logprobs.text_offset == before


def test_a_bias_forces_a_token(client: OpenAI) -> None:
    made = complete(client, logit_bias={"100": 100}, max_tokens=3, logprobs=1).choices[0]
    assert len(set(made.logprobs.tokens)) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"presence_penalty": 2},
        {"frequency_penalty": 2},
        {"extra_body": {"repetition_penalty": 50}},
        {"temperature": 2, "seed": 1},
        {"temperature": 2, "seed": 1, "top_p": 0.99},
        {"temperature": 2, "seed": 1, "extra_body": {"min_p": 0.9}},
    ],
)
def test_sampling_parameters_take_effect(client: OpenAI, options: Any) -> None:
    forced = {"logit_bias": {"100": 2, "101": 1.9}, "max_tokens": 30}
    greedy = complete(client, **forced).choices[0].text
    if options.get("extra_body", {}).get("min_p"):
        greedy = complete(client, **forced, temperature=2, seed=1).choices[0].text
    assert complete(client, **forced, **options).choices[0].text != greedy


def test_top_k_of_one_is_greedy_at_any_temperature(client: OpenAI) -> None:
    made = complete(client, temperature=2, extra_body={"top_k": 1})
    assert made.choices[0].text == complete(client).choices[0].text


@pytest.mark.parametrize("seed", range(3))
def test_a_json_schema_is_followed_by_a_model_of_random_weights(client: OpenAI, seed: int) -> None:
    made = chat(
        client, temperature=2, seed=seed, max_tokens=64,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}},
    ).choices[0]  # fmt: skip
    assert made.finish_reason == "stop"
    city = json.loads(made.message.content)
    assert city.keys() == {"name", "age", "kind"}
    assert len(city["name"]) <= 8
    assert 0 <= city["age"] <= 99
    assert city["kind"] in ("town", "village")


def test_the_clients_own_parse_reads_a_pydantic_model(client: OpenAI) -> None:
    schema: Any = City
    made = client.chat.completions.parse(
        model="tiny", messages=USER, response_format=schema, max_tokens=60
    )
    assert isinstance(made.choices[0].message.parsed, City)


def test_json_object_starts_an_object(client: OpenAI) -> None:
    made = chat(client, response_format={"type": "json_object"}).choices[0]
    assert made.message.content.startswith("{")


def test_a_regex_and_a_grammar_are_followed(client: OpenAI) -> None:
    for rule in ({"regex": "(yes|no)"}, {"grammar": 'start: "yes" | "no"'}):
        for seed in range(3):
            made = complete(client, temperature=2, seed=seed, extra_body=rule).choices[0]
            assert made.text in ("yes", "no")
            assert made.finish_reason == "stop"


def test_a_repeated_prompt_is_reported_as_cached(client: OpenAI) -> None:
    prompt = "A long prompt that two requests have in common, to its last word"
    first, second = complete(client, prompt), complete(client, prompt)
    assert second.choices == first.choices
    assert second.usage.prompt_tokens_details.cached_tokens > 0
    assert second.usage.prompt_tokens_details.cached_tokens < second.usage.prompt_tokens


def test_an_answer_ends_at_the_end_of_the_context(client: OpenAI) -> None:
    made = complete(client, max_tokens=64, prompt="a " * 30, logit_bias={"2": -100})
    assert made.choices[0].finish_reason == "length"
    assert made.usage.total_tokens == CONTEXT + 1  # the last token is not written to the ring


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"temperature": 3}, "temperature"),
    ({"temperature": "warm"}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 65}, "max_tokens"),
    ({"n": 17}, "n"),
    ({"n": 9, "prompt": ["a", "b"]}, "n"),
    ({"stop": [""]}, "stop"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"5000000": 1}}, "logit_bias"),
    ({"logprobs": 21}, "logprobs"),
    ({"echo": True}, "echo"),
    ({"suffix": "end"}, "suffix"),
    ({"best_of": 2}, "best_of"),
    ({"prompt": [4000000]}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["a", [1]]}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"),
    ({"tools": []}, "tools"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"regex": "(("}, "regex"),
    ({"grammar": "start: nothing"}, "grammar"),
    ({"regex": "a", "grammar": 'start: "a"'}, "grammar"),
    ({"prompt": "a " * 200}, ""),
]


@pytest.mark.parametrize(("body", "param"), REFUSED, ids=lambda value: str(value)[:30])
def test_an_unsupported_parameter_is_refused_by_name(
    server: Server, body: dict[str, Any], param: str
) -> None:
    answer = server.ask("/v1/completions", {"model": "tiny", "prompt": "a", **body})
    assert answer.status == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == (param or None)
    assert len(error["message"]) > 20


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_completion_tokens": 4}, "max_completion_tokens"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {
                "name": "x", "schema": {"type": "string", "not": {"maxLength": 3}}}}},
            "response_format",
        ),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_the_client_raises_bad_request_for_invalid_chats(
    client: OpenAI, options: Any, param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, **options)
    assert refused.value.param == param


def test_another_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.completions.create(model="gpt-5", prompt="x")


@pytest.mark.parametrize(
    ("data", "told"),
    [(b"", "JSON object"), (b"{", "not JSON"), (b"[]", "JSON object"), (b'"x"', "JSON object"),
     (b'{"model": NaN}', "model"), (b"\xff\xfe", ""), (b"[" * 100_000, "")],
    ids=range(7),
)  # fmt: skip
def test_a_body_that_is_not_a_request_is_a_400(server: Server, data: bytes, told: str) -> None:
    answer = server.ask("/v1/completions", data=data)
    assert answer.status == 400
    assert told in answer.json()["error"]["message"]


def test_unknown_paths_and_methods_get_the_same_form_of_error(server: Server) -> None:
    nothing, method = server.ask("/v1/nothing"), server.ask("/v1/completions")
    assert (nothing.status, nothing.json()["error"]["type"]) == (404, "not_found_error")
    assert (method.status, method.json()["error"]["type"]) == (405, "invalid_request_error")
    assert method.headers["Allow"] == "POST"
