"""Parts of the server, without a server: answers, grammars, jobs, keys and the page."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from graphs.errors import UsageError
from runtime.decoding.sampling import Sampled, SamplingParams
from runtime.scheduling.request import End, Request
from runtime.serve.errors import ApiError
from runtime.serve.jobs import Inbox, Job
from runtime.serve.metrics import Metrics
from runtime.serve.openai.answer import Answer, Piece
from runtime.serve.openai.calls import Call
from runtime.serve.openai.grammar import Grammars
from runtime.serve.openai.streaming import Progress
from runtime.serve.page import page_response
from runtime.serve.service import Service
from runtime.serve.settings import Settings, read_api_keys
from runtime.text.stop_strings import StopStrings
from runtime.text.tokenizer import Tokenizer

LETTERS = range(3 + 97, 3 + 123)  # the tiny vocabulary: three control tokens, then the 256 bytes


@pytest.fixture(scope="module")
def tokenizer(plain_bundle: Path) -> Tokenizer:
    return Tokenizer.load(plain_bundle)


def read(answer: Answer, ids: list[int]) -> list[Piece]:
    pieces = [answer.push(Sampled(token_id=i, logprob=-float(at))) for at, i in enumerate(ids)]
    return [*pieces, answer.finish()]


@given(ids=st.lists(st.integers(0, 290), max_size=40), stops=st.lists(st.text("ab ", min_size=1)))
@example(ids=[191], stops=[])  # the zero byte
def test_joined_pieces_are_the_text_up_to_its_stop_string_and_logprobs_are_in_order(
    tokenizer: Tokenizer, ids: list[int], stops: list[str]
) -> None:
    ids = [i for i in ids if i not in tokenizer.stop_ids]
    pieces = read(Answer(tokenizer, stops, chat=False, logprobs=True), ids)
    text = "".join(piece.text for piece in pieces)
    whole = StopStrings(stops)
    assert text == whole.push(tokenizer.decode(ids, continuation=True)).text + whole.flush()
    scored = [score for piece in pieces for score in piece.scored]
    assert [score.sampled.token_id for score in scored] == ids[: len(scored)]
    offsets = [score.offset for score in scored]
    assert offsets == sorted(offsets)
    assert all(offset <= len(text) for offset in offsets)
    full = Answer(tokenizer, [], chat=False, logprobs=True)
    assert sum(len(piece.scored) for piece in read(full, ids)) == len(ids)


def test_the_end_of_text_token_counts_and_has_no_logprob(tokenizer: Tokenizer) -> None:
    (end,) = tokenizer.stop_ids
    answer = Answer(tokenizer, [], chat=False, logprobs=True)
    pieces = read(answer, [LETTERS[0], end])
    assert answer.count == 2
    assert sum(len(piece.scored) for piece in pieces) == 1


def test_text_that_may_become_a_stop_string_is_held_back_until_the_end(
    tokenizer: Tokenizer,
) -> None:
    answer = Answer(tokenizer, ["ab!"], chat=False, logprobs=True)
    pieces = read(answer, tokenizer.encode("xab", add_bos=False))
    assert pieces[-1].text == "ab"
    assert not answer.stopped


def greedy(constraint: Any, vocab_size: int, favourite: int) -> list[int]:
    """The tokens of a model that always prefers `favourite`, under a constraint."""
    ids: list[int] = []
    for _ in range(200):
        logits = np.zeros(vocab_size, np.float32)
        logits[favourite] = 1
        constraint.mask(logits)
        ids.append(int(logits.argmax()))
        if constraint.accept(ids[-1]):
            return ids
    raise AssertionError("the grammar never ended")


def test_a_grammar_forces_its_text_and_ends_it(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer, tokenizer.vocab_size + 5)  # a model may have unused tokens
    size = tokenizer.vocab_size + 5
    assert tokenizer.decode(greedy(grammars.regex("(yes|no)"), size, size - 1)) in ("yes", "no")
    schema = {"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 2}
    assert tokenizer.decode(greedy(grammars.json_schema(schema), size, 0)) == "[1, 1]"


def test_copies_of_a_grammar_start_at_its_beginning(tokenizer: Tokenizer) -> None:
    fresh = Grammars(tokenizer, tokenizer.vocab_size).regex("ab?").copies()
    first, second = fresh(), fresh()
    (a,) = tokenizer.encode("a", add_bos=False)[-1:]
    first.accept(a)
    logits = np.zeros(tokenizer.vocab_size, np.float32)
    second.mask(logits)
    (end,) = tokenizer.stop_ids
    assert logits[end] == -np.inf, "the second has not moved with the first"


@pytest.mark.parametrize("schema", [{"type": "nothing"}, {"not": {}}, {"$ref": "http://else"}])
def test_a_schema_that_cannot_be_followed_is_refused(tokenizer: Tokenizer, schema: Any) -> None:
    with pytest.raises(UsageError, match="JSON schema cannot be followed"):
        Grammars(tokenizer, tokenizer.vocab_size).json_schema(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"const": "\ud800"}, {"pattern": "a?" * 3000},
        {"enum": ["x" * 900 + str(i) for i in range(99)]},
        {"patternProperties": {f"a{i}": {} for i in range(99)}},
    ],
    ids=["half a character", "long pattern", "long", "many patterns"],
)  # fmt: skip
def test_a_schema_that_is_too_large_or_unreadable_is_refused(
    tokenizer: Tokenizer, schema: Any
) -> None:
    with pytest.raises(UsageError, match=r"characters|be read|patternProperties"):
        Grammars(tokenizer, tokenizer.vocab_size).json_schema(schema)


def test_a_deep_grammar_is_followed_or_refused_and_never_overflows_the_stack(
    tokenizer: Tokenizer,
) -> None:
    def chain(links: int) -> str:
        return "start: a0\n" + "".join(f"a{i}:a{i + 1}\n" for i in range(links)) + f'a{links}: "x"'

    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    (x,) = tokenizer.encode("x", add_bos=False)
    longest = grammars.lark(chain(1200))
    assert tokenizer.decode(greedy(longest, tokenizer.vocab_size, x)) == "x"
    with pytest.raises(UsageError, match=r"has .* characters; up to 16,384"):
        grammars.lark(chain(3000))  # kills the process with a stack of 8 MiB
    with pytest.raises(UsageError, match=r"has .* characters; up to 4,096"):
        grammars.regex("a?" * 3000)
    with pytest.raises(UsageError, match="cannot be read"):
        grammars.regex("\ud800")


def test_a_grammar_without_any_valid_text_is_a_usage_error(tokenizer: Tokenizer) -> None:
    endless = Grammars(tokenizer, tokenizer.vocab_size).json_schema({"$ref": "#"})
    with pytest.raises(UsageError, match="cannot be followed further"):
        endless.mask(np.zeros(tokenizer.vocab_size, np.float32))


class Recorder:
    """Replaces a scheduler: records what is submitted and cancelled."""

    def __init__(self) -> None:
        self.delivers: list[Any] = []
        self.cancelled: list[int] = []

    def submit(self, request: Request, deliver: Any) -> Any:
        self.delivers.append(deliver)
        return type("Ticket", (), {"number": len(self.delivers) - 1, "started": None})()

    def cancel(self, ticket: Any) -> None:
        self.cancelled.append(ticket.number)


def test_a_client_that_reads_nothing_overflows_its_buffer_at_the_limit(
    tokenizer: Tokenizer,
) -> None:
    async def run() -> tuple[bool, bool, int]:
        scheduler: Any = Recorder()
        inbox = Inbox(asyncio.get_running_loop())
        job = Job(scheduler, inbox, Metrics(lambda: None), buffered=100)
        job.submit([None])  # type: ignore[list-item]
        for _ in range(100):
            scheduler.delivers[0](Sampled(token_id=1))
        await asyncio.sleep(0)
        within = job.overflow.is_set()
        scheduler.delivers[0](Sampled(token_id=1))
        scheduler.delivers[0](End(reason="stop", cached_tokens=0))
        await asyncio.sleep(0)
        return within, job.overflow.is_set(), len(await job.take())

    assert asyncio.run(run()) == (False, True, 102)


def test_nothing_is_lost_if_all_tokens_arrive_before_the_first_read(tokenizer: Tokenizer) -> None:
    ids = [LETTERS[0], LETTERS[1]]

    async def run() -> list[str]:
        scheduler: Any = Recorder()
        job = Job(scheduler, Inbox(asyncio.get_running_loop()), Metrics(lambda: None), buffered=100)
        job.submit([None])  # type: ignore[list-item]
        for token in ids:
            scheduler.delivers[0](Sampled(token_id=token))
        scheduler.delivers[0](End(reason="length", cached_tokens=0))
        await asyncio.sleep(0)
        call = Call(
            prompts=((1,),), n=1, params=SamplingParams(), max_new_tokens=2, stop_ids=frozenset(),
            stops=(), chat=False, constrain=None, stream=True, include_usage=False,
        )  # fmt: skip
        steps = [step async for found in Progress(job, call, tokenizer).steps() for step in found]
        return [*(step.piece.text for step in steps), str(steps[-1].reason)]

    answer = Answer(tokenizer, (), chat=False, logprobs=False)
    assert asyncio.run(run()) == ["".join(piece.text for piece in read(answer, ids)), "length"]


def test_a_service_that_is_not_loaded_refuses_requests(tmp_path: Path) -> None:
    service = Service(Settings(bundle=tmp_path, model="none"))
    assert service.state == "loading"
    with pytest.raises(ApiError) as refused:
        service.ready()
    assert refused.value.status_code == 503
    assert b"mistralc_requests" in service.metrics.text()


def test_a_key_file_has_one_key_a_line_and_comments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys"
    path.write_text("# comment\none\n\n two \n")
    assert read_api_keys(path) == ("one", "two")
    path.write_text("a key\n")
    with pytest.raises(UsageError, match="blank inside"):
        read_api_keys(path)
    with pytest.raises(UsageError, match="could not be read"):
        read_api_keys(tmp_path / "none")
    monkeypatch.setenv("MISTRALC_API_KEYS", "")
    assert read_api_keys(None) == ()


def test_the_pages_policy_allows_only_its_own_script() -> None:
    response = page_response()
    policy = response.headers["Content-Security-Policy"]
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    text = bytes(response.body).decode()
    assert "http:" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https:" not in text
    assert " style=" not in text
    assert " onclick=" not in text
