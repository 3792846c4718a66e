"""The `generate` command: prompts, output, sampling options and limits."""

from pathlib import Path

import pytest

from graphs.manifest import read_manifest
from tests.conftest import CONTEXT, Command
from tests.support.commands import NO_END, json_output, succeeded

PROMPT = "The ring turns"


def test_a_prompt_is_the_same_from_an_argument_a_file_or_standard_input(
    mistralc: Command, sliding_bundle: Path, tmp_path: Path
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT, encoding="utf-8")
    generate = ("generate", sliding_bundle, "-n", "12", "-t", "0")
    text = succeeded(mistralc(*generate, PROMPT))
    assert len(text) > 5
    assert succeeded(mistralc(*generate, "--file", file)) == text
    assert succeeded(mistralc(*generate, stdin=PROMPT.encode())) == text
    assert succeeded(mistralc(*generate, "-", stdin=PROMPT.encode())) == text
    assert succeeded(mistralc(*generate, PROMPT + "!")) != text, "the prompt has no effect"


def test_a_prompt_keeps_its_line_breaks_spaces_and_scripts(
    mistralc: Command, sliding_bundle: Path
) -> None:
    prompt = "  zwei\n\n Zeilen\t日本 🙂 \n"
    result = json_output(mistralc("generate", sliding_bundle, "--json", stdin=prompt.encode()))
    # The tiny vocabulary has one token per byte; BOS comes first.
    assert result["timings"]["prompt_tokens"] == 1 + len(prompt.encode())


def test_streamed_text_equals_unstreamed_text(mistralc: Command, sliding_bundle: Path) -> None:
    generate = ("generate", sliding_bundle, PROMPT, "-n", "40", *NO_END)
    streamed = succeeded(mistralc(*generate, "--stream"))
    assert streamed == succeeded(mistralc(*generate, "--no-stream"))
    assert streamed == json_output(mistralc(*generate, "--json"))["text"] + "\n"


def test_a_chat_prompt_goes_through_the_template_with_its_system_message(
    mistralc: Command, sliding_bundle: Path
) -> None:
    plain = json_output(mistralc("generate", sliding_bundle, "hi", "--json"))
    chat = json_output(mistralc("generate", sliding_bundle, "hi", "--chat", "--json"))
    system = json_output(
        mistralc("generate", sliding_bundle, "hi", "--chat", "--system", "be brief", "--json")
    )
    counts = [run["timings"]["prompt_tokens"] for run in (plain, chat, system)]
    template = len("[INST] ") + len(" [/INST]")
    assert counts == [3, 3 + template, 3 + 2 * template + len("be brief")]


def test_the_report_of_a_run_has_its_timings(mistralc: Command, sliding_bundle: Path) -> None:
    result = json_output(
        mistralc("generate", sliding_bundle, PROMPT, "-n", "20", *NO_END, "--json")
    )
    assert result["finish_reason"] == "length"
    assert len(result["tokens"]) == 20
    timings = result["timings"]
    assert timings["prompt_tokens"] == 1 + len(PROMPT)
    assert timings["cached_tokens"] == 0
    assert timings["new_tokens"] == 20
    assert timings["load_s"] > 0
    assert timings["prefill_tokens_per_s"] == pytest.approx(
        timings["prompt_tokens"] / timings["ttft_s"]
    )
    assert timings["decode_tokens_per_s"] == pytest.approx(19 / timings["decode_s"])


def test_the_text_ends_before_a_stop_string(mistralc: Command, sliding_bundle: Path) -> None:
    generate = ("generate", sliding_bundle, PROMPT, "-n", "60", *NO_END, "--json")
    whole = json_output(mistralc(*generate))["text"]
    stop = whole[20:23]
    cut = json_output(mistralc(*generate, "--stop", stop, "--stop", "never there"))
    assert cut["text"] == whole[: whole.index(stop)]
    assert cut["finish_reason"] == "stop"
    assert cut["timings"]["new_tokens"] < 60


def test_a_seed_gives_the_same_text_again(mistralc: Command, sliding_bundle: Path) -> None:
    generate = ("generate", sliding_bundle, PROMPT, "-n", "30", "-t", "1", *NO_END, "--json")
    one = json_output(mistralc(*generate, "--seed", "1"))["tokens"]
    assert json_output(mistralc(*generate, "--seed", "1"))["tokens"] == one
    # Random weights give almost uniform logits: 30 equal draws from 320 tokens are no accident.
    assert json_output(mistralc(*generate, "--seed", "2"))["tokens"] != one


def test_every_sampling_option_reaches_the_sampler(mistralc: Command, sliding_bundle: Path) -> None:
    generate = ("generate", sliding_bundle, PROMPT, "-n", "40", *NO_END, "--json")
    greedy = json_output(mistralc(*generate))["tokens"]
    hot = ("-t", "3", "--seed", "5")
    sampled = json_output(mistralc(*generate, *hot))["tokens"]
    assert sampled != greedy
    for narrow in (("--top-k", "1"), ("--top-p", "0"), ("--min-p", "1")):
        assert json_output(mistralc(*generate, *hot, *narrow))["tokens"] == greedy, narrow
    assert len(set(greedy)) < len(greedy), "penalties need a text that repeats tokens"
    for penalty in ("--repetition-penalty", "--presence-penalty", "--frequency-penalty"):
        tokens = json_output(mistralc(*generate, penalty, "50"))["tokens"]
        assert len(set(tokens)) == len(tokens), f"with {penalty} 50 no token should repeat"
    forced = json_output(mistralc(*generate, "--logit-bias", "70=1000"))["tokens"]
    assert set(forced) == {70}


def test_log_probabilities_are_reported_for_every_token(
    mistralc: Command, sliding_bundle: Path
) -> None:
    generate = ("generate", sliding_bundle, PROMPT, "-n", "5", "-t", "0", "--json")
    result = json_output(mistralc(*generate, "--logprobs", "3"))
    assert [entry["token_id"] for entry in result["logprobs"]] == result["tokens"]
    for entry in result["logprobs"]:
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0] == [entry["token_id"], entry["logprob"]], "greedy"
        assert entry["logprob"] < 0
    assert "logprobs" not in json_output(mistralc(*generate))


def test_a_sliding_bundle_generates_beyond_its_ring(
    mistralc: Command, sliding_bundle: Path
) -> None:
    ring = read_manifest(sliding_bundle).ring.capacity(8)
    count = 20 * ring
    result = json_output(
        mistralc("generate", sliding_bundle, PROMPT, "-n", count, *NO_END, "--json")
    )
    assert len(result["tokens"]) == count
    assert result["finish_reason"] == "length"


def test_a_sliding_bundle_reads_a_prompt_of_many_rings(
    mistralc: Command, sliding_bundle: Path
) -> None:
    prompt = "long " * 100
    result = json_output(mistralc("generate", sliding_bundle, "--json", "-n", "2", prompt))
    assert result["timings"]["prompt_tokens"] == 501


def test_a_bundle_without_a_window_stops_at_its_context(
    mistralc: Command, plain_bundle: Path
) -> None:
    generate = ("generate", plain_bundle, *NO_END, "--json")
    result = json_output(mistralc(*generate, "-n", 10 * CONTEXT, PROMPT))
    assert result["finish_reason"] == "length"
    # All positions are used; the token sampled after the last one needs no position.
    assert result["timings"]["prompt_tokens"] + len(result["tokens"]) == CONTEXT + 1
    full = json_output(mistralc(*generate, "-n", 10, "x" * (CONTEXT - 1)))
    assert (len(full["tokens"]), full["finish_reason"]) == (1, "length")


def test_speculation_changes_no_token(mistralc: Command, sliding_bundle: Path) -> None:
    command = ("generate", sliding_bundle, "to be or not to be or not", "-n", "60", "--json")
    command = (*command, "--temperature", "0.3", "--seed", "4")
    plain, speculated = (json_output(mistralc(*command, "--speculate", n)) for n in ("0", "6"))
    assert plain["tokens"] == speculated["tokens"]
