"""Prompts and options that `generate`, `chat` and `bench` refuse."""

import json
import os
from pathlib import Path

import pytest

from exporter import export as exporting
from tests.conftest import CONTEXT, Command
from tests.support.commands import Copy, refused
from tests.support.tiny import traced


def test_a_prompt_longer_than_the_context_is_refused(mistralc: Command, plain_bundle: Path) -> None:
    ended = mistralc("generate", plain_bundle, "x" * CONTEXT)
    refused(ended, f"{CONTEXT + 1} tokens", f"holds {CONTEXT} in all", "--window")


@pytest.mark.parametrize("arguments", [("",), ("-",), ()], ids=["argument", "dash", "nothing"])
def test_an_empty_prompt_is_refused(
    mistralc: Command, sliding_bundle: Path, arguments: tuple[str, ...]
) -> None:
    refused(mistralc("generate", sliding_bundle, *arguments), "prompt is empty", code=2)


def test_an_empty_prompt_file_is_refused(
    mistralc: Command, sliding_bundle: Path, tmp_path: Path
) -> None:
    file = tmp_path / "empty.txt"
    file.touch()
    refused(mistralc("generate", sliding_bundle, "-f", file), "prompt is empty", code=2)


def test_a_prompt_that_is_not_utf8_is_refused(
    mistralc: Command, sliding_bundle: Path, tmp_path: Path
) -> None:
    latin1 = "café".encode("latin-1")
    message = ("not UTF-8", "byte 3 is 0xe9", "iconv")
    refused(mistralc("generate", sliding_bundle, stdin=latin1), "standard input", *message)
    file = tmp_path / "latin1.txt"
    file.write_bytes(latin1)
    refused(mistralc("generate", sliding_bundle, "--file", file), str(file), *message)
    refused(mistralc("chat", sliding_bundle, stdin=latin1), "Standard input", "not UTF-8", "iconv")
    argument = os.fsdecode(latin1)  # how Python passes an argument that is not UTF-8
    refused(mistralc("generate", sliding_bundle, argument), "Valid Unicode is expected")


def test_an_unreadable_prompt_file_is_refused(
    mistralc: Command, sliding_bundle: Path, tmp_path: Path
) -> None:
    message = ("could not be read", str(tmp_path), "--file")
    refused(mistralc("generate", sliding_bundle, "--file", tmp_path / "missing"), *message)
    refused(mistralc("generate", sliding_bundle, "--file", tmp_path), *message)


def test_a_system_message_that_the_template_refuses_is_an_error(
    mistralc: Command,
    monkeypatch: pytest.MonkeyPatch,
    sliding_checkpoint: Path,
    copy_of: Copy,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(exporting, "trace", traced)
    checkpoint = copy_of(sliding_checkpoint)
    settings = checkpoint / "tokenizer_config.json"
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('No system!') }}{% endif %}"
    settings.write_text(
        json.dumps({**json.loads(settings.read_bytes()), "chat_template": template}),
        encoding="utf-8",
    )
    bundle = tmp_path / "bundle"
    assert mistralc("export", checkpoint, "-o", bundle).code == 0
    ended = mistralc("generate", bundle, "hi", "--chat", "--system", "x")
    refused(ended, "No system!", "template refuses", code=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--stop", ""), ("stop string is empty", "leave the option out")),
        (("--logit-bias", "garbage"), ("--logit-bias", "'garbage'", "42=-100")),
        (("--logit-bias", "1=nan"), ("logit_bias", "nan")),
        (("--temperature", "-1"), ("temperature is -1.0", "0 is greedy")),
        (("--top-p", "1.5"), ("top_p is 1.5", "from 0 to 1")),
        (("--top-k", "-3"), ("top_k is -3", "0 is off")),
        (("--seed", "-3"), ("seed is -3",)),
        (("--logprobs", "3"), ("--logprobs", "add --json")),
        (("--system", "be brief"), ("--system", "add --chat")),
        (("--file", "also.txt"), ("--file", "give one of them")),
    ],
    ids=lambda value: (
        " ".join(value[:2]) if isinstance(value[0], str) and value[0][0] == "-" else ""
    ),
)
def test_an_invalid_option_is_refused_before_the_bundle_is_opened(
    mistralc: Command, tmp_path: Path, arguments: tuple[str, ...], message: tuple[str, ...]
) -> None:
    # If the bundle were opened first, the error would be that it is missing.
    refused(mistralc("generate", tmp_path / "nothing", "hi", *arguments), *message, code=2)


def test_a_logit_bias_for_an_unknown_token_is_refused(
    mistralc: Command, sliding_bundle: Path
) -> None:
    ended = mistralc("generate", sliding_bundle, "hi", "--logit-bias", "320=1")
    refused(ended, "Token 320", "0 to 319", code=2)


def test_chat_refuses_the_same_invalid_options(mistralc: Command, tmp_path: Path) -> None:
    refused(mistralc("chat", tmp_path, "-t", "-1"), "temperature is -1.0", code=2)
    refused(mistralc("chat", tmp_path, "--stop", ""), "stop string is empty", code=2)


def test_a_plot_that_cannot_be_saved_is_refused_before_measuring(
    mistralc: Command, tmp_path: Path
) -> None:
    bench = ("bench", tmp_path / "nothing", "--plot")
    refused(mistralc(*bench, tmp_path / "x.png"), "--positions N", code=2)
    missing = tmp_path / "missing" / "x.png"
    refused(mistralc(*bench, missing, "--positions", 9), str(missing), "existing directory", code=2)
    refused(mistralc(*bench, tmp_path, "--positions", 9), "existing directory", code=2)


def test_positions_beyond_the_context_are_refused(mistralc: Command, plain_bundle: Path) -> None:
    ended = mistralc("bench", plain_bundle, "--positions", 10 * CONTEXT)
    refused(ended, f"ended after {CONTEXT} of {10 * CONTEXT} tokens", "--window")
