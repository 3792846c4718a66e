"""The `chat` command: turns, commands, and the ring that is kept between turns."""

import re
from pathlib import Path

from tests.conftest import CONTEXT, Command
from tests.support.commands import succeeded


def test_a_chat_answers_each_line_and_keeps_the_ring(mistralc: Command, plain_bundle: Path) -> None:
    lines = "hi\n/stats\nok\n/stats\n/quit\nnever read\n"
    ended = mistralc("chat", plain_bundle, "-n", "4", "-t", "0", stdin=lines.encode())
    stats = statistics_of(succeeded(ended))
    template = len("[INST] ") + len(" [/INST]")
    first, second = stats
    assert first["prompt_tokens"] == 1 + template + 2
    assert first["cached_tokens"] == 0
    assert second["cached_tokens"] >= first["prompt_tokens"], "the first turn was prefilled again"
    assert second["prompt_tokens"] > second["cached_tokens"], "the new question must be prefilled"


def statistics_of(out: str) -> list[dict[str, float]]:
    """The figures that each /stats printed."""
    pairs = re.findall(r"^(\w+) +([\d,.]+|-)$", out, re.MULTILINE)
    names = [name for name, _ in pairs]
    width = names.index("decode_tokens_per_s") + 1 - names.index("prompt_tokens")
    assert len(pairs) % width == 0
    numbers = [(name, float(value.replace(",", "").replace("-", "nan"))) for name, value in pairs]
    return [dict(numbers[i : i + width]) for i in range(0, len(numbers), width)]


def test_undo_keeps_the_ring_of_the_earlier_turns(mistralc: Command, plain_bundle: Path) -> None:
    lines = "hi\nfirst\n/undo\nother\n/stats\n"
    ended = mistralc("chat", plain_bundle, "-n", "2", stdin=lines.encode())
    assert ended.code == 0, ended.err
    (stats,) = statistics_of(ended.out)
    # After /undo the chat is: hi, its answer, other. Only "other" is new.
    assert stats["prompt_tokens"] - stats["cached_tokens"] <= len("other [/INST]")


def test_a_new_chat_forgets_the_previous_one(mistralc: Command, plain_bundle: Path) -> None:
    lines = "hi\n/stats\nok\n/new\nhi\n/stats\n"
    out = succeeded(mistralc("chat", plain_bundle, "-n", "2", stdin=lines.encode()))
    before, after = statistics_of(out)
    assert before["prompt_tokens"] == after["prompt_tokens"]
    answers = [line for line in out.splitlines() if line and not re.match(r"\w+ +[\d,.-]+$", line)]
    assert answers[0] == answers[-1], "the same first question must get the same answer"


def test_a_long_sliding_chat_prefills_only_its_last_turns(
    mistralc: Command, sliding_bundle: Path
) -> None:
    lines = "".join(f"question {i}\n" for i in range(20)) + "/stats\n"
    out = succeeded(mistralc("chat", sliding_bundle, "-n", "2", stdin=lines.encode()))
    (stats,) = statistics_of(out)
    assert stats["cached_tokens"] > 300, "every turn prefilled the whole chat"
    assert stats["prompt_tokens"] - stats["cached_tokens"] < 40


def test_a_chat_that_exceeds_the_context_says_so_and_continues_after_new(
    mistralc: Command, plain_bundle: Path
) -> None:
    lines = "x" * CONTEXT + "\nhi\n/stats\n/quit\n"
    ended = mistralc("chat", plain_bundle, "-n", "2", stdin=lines.encode())
    assert ended.code == 0
    assert ended.err.count(f"this bundle holds {CONTEXT} in all") == 1
    assert "/new starts over" in ended.err
    (stats,) = statistics_of(ended.out)
    assert stats["prompt_tokens"] < CONTEXT, "a refused message must not stay in the chat"


def test_an_unknown_command_in_a_chat_lists_the_commands(
    mistralc: Command, plain_bundle: Path
) -> None:
    out = succeeded(mistralc("chat", plain_bundle, stdin=b"/nonsense\n\n/stats\n"))
    assert out.count("/undo") == 2, "/stats before any answer lists the commands too"
