"""The commands as a user meets them: what they print, what they write. In process but for two."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from exporter.bundle.staging import list_files
from graphs.manifest import read_manifest
from runtime.bundle.open import open_bundle
from runtime.cli import options
from runtime.decoding.sampling_defaults import sampling_params
from runtime.system.memory_bandwidth import BYTES
from tests.conftest import CONTEXT, Command, Ended

Copy = Callable[[Path], Path]

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "The ring turns"
NO_END = ("--logit-bias", "2=-100")  # bans the end-of-text token, so that lengths are certain
COMMANDS = ("export", "verify", "calibrate", "eval", "report", "generate", "chat", "inspect",
            "bench", "plan", "doctor", "diff", "keygen", "sign", "serve")  # fmt: skip


def told(ended: Ended) -> str:
    """Standard output of a command that must have succeeded in silence otherwise."""
    assert ended.code == 0, ended.err
    assert ended.err == ""
    return ended.out


def reported(ended: Ended) -> dict[str, Any]:
    """The one JSON object that a command with --json prints, on one line."""
    out = told(ended)
    assert out.count("\n") == 1
    result: dict[str, Any] = json.loads(out)
    return result


# export


def test_export_reports_the_bundle_that_it_wrote(
    mistralc: Command, sliding_checkpoint: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "out" / "bundle"
    result = reported(
        mistralc("export", sliding_checkpoint, "-o", bundle, "--window", 12, "--chunk", 4, "--json")
    )
    assert result["bundle"] == str(bundle)
    assert result["manifest"] == json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    manifest = open_bundle(bundle).manifest
    assert manifest.model.layer_windows == (12, 12)
    assert manifest.window_source == "user"
    assert manifest.ring.chunk == 4
    assert manifest.verification is not None
    assert manifest.verification["passed"] is True


def test_export_says_what_to_do_next(
    mistralc: Command,
    plain_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    out = told(mistralc("export", plain_checkpoint))
    assert out.splitlines()[0].startswith("build/tiny-cpu-fp32: ")
    next_command = out.splitlines()[-1].split()
    assert next_command[:3] == ["mistralc", "generate", "build/tiny-cpu-fp32"]
    text = told(mistralc("generate", next_command[2], "--chat", "What?", "-n", "3"))
    assert text, "the command that export prints must work where export ran"


# generate


def test_a_prompt_is_the_same_from_an_argument_a_file_or_standard_input(
    mistralc: Command, sliding_bundle: Path, tmp_path: Path
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT, encoding="utf-8")
    generate = ("generate", sliding_bundle, "-n", "12", "-t", "0")
    text = told(mistralc(*generate, PROMPT))
    assert len(text) > 5
    assert told(mistralc(*generate, "--file", file)) == text
    assert told(mistralc(*generate, stdin=PROMPT.encode())) == text
    assert told(mistralc(*generate, "-", stdin=PROMPT.encode())) == text
    assert told(mistralc(*generate, PROMPT + "!")) != text, "the prompt has no effect at all"


def test_a_prompt_keeps_its_line_breaks_spaces_and_scripts(
    mistralc: Command, sliding_bundle: Path
) -> None:
    prompt = "  zwei\n\n Zeilen\t日本 🙂 \n"
    result = reported(mistralc("generate", sliding_bundle, "--json", stdin=prompt.encode()))
    # The tiny vocabulary has a token for each byte; the first one is the BOS.
    assert result["timings"]["prompt_tokens"] == 1 + len(prompt.encode())


def test_streamed_text_is_the_text_that_comes_at_once(
    mistralc: Command, sliding_bundle: Path
) -> None:
    generate = ("generate", sliding_bundle, PROMPT, "-n", "40", *NO_END)
    streamed = told(mistralc(*generate, "--stream"))
    assert streamed == told(mistralc(*generate, "--no-stream"))
    assert streamed == reported(mistralc(*generate, "--json"))["text"] + "\n"


def test_a_chat_prompt_goes_through_the_template_with_its_system_message(
    mistralc: Command, sliding_bundle: Path
) -> None:
    plain = reported(mistralc("generate", sliding_bundle, "hi", "--json"))
    chat = reported(mistralc("generate", sliding_bundle, "hi", "--chat", "--json"))
    system = reported(
        mistralc("generate", sliding_bundle, "hi", "--chat", "--system", "be brief", "--json")
    )
    counts = [run["timings"]["prompt_tokens"] for run in (plain, chat, system)]
    template = len("[INST] ") + len(" [/INST]")
    assert counts == [3, 3 + template, 3 + 2 * template + len("be brief")]


def test_the_report_of_a_run_has_its_timings(mistralc: Command, sliding_bundle: Path) -> None:
    result = reported(mistralc("generate", sliding_bundle, PROMPT, "-n", "20", *NO_END, "--json"))
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


def test_a_stop_string_and_what_follows_are_not_in_the_text(
    mistralc: Command, sliding_bundle: Path
) -> None:
    generate = ("generate", sliding_bundle, PROMPT, "-n", "60", *NO_END, "--json")
    whole = reported(mistralc(*generate))["text"]
    stop = whole[20:23]
    cut = reported(mistralc(*generate, "--stop", stop, "--stop", "never there"))
    assert cut["text"] == whole[: whole.index(stop)]
    assert cut["finish_reason"] == "stop"
    assert cut["timings"]["new_tokens"] < 60


def test_a_seed_gives_the_same_text_again(mistralc: Command, sliding_bundle: Path) -> None:
    generate = ("generate", sliding_bundle, PROMPT, "-n", "30", "-t", "1", *NO_END, "--json")
    one = reported(mistralc(*generate, "--seed", "1"))["tokens"]
    assert reported(mistralc(*generate, "--seed", "1"))["tokens"] == one
    # Random weights spread logits little, so 30 equal draws from 320 tokens are no accident.
    assert reported(mistralc(*generate, "--seed", "2"))["tokens"] != one


def test_every_sampling_option_reaches_the_sampler(mistralc: Command, sliding_bundle: Path) -> None:
    generate = ("generate", sliding_bundle, PROMPT, "-n", "40", *NO_END, "--json")
    greedy = reported(mistralc(*generate))["tokens"]
    hot = ("-t", "3", "--seed", "5")
    sampled = reported(mistralc(*generate, *hot))["tokens"]
    assert sampled != greedy
    for narrow in (("--top-k", "1"), ("--top-p", "0"), ("--min-p", "1")):
        assert reported(mistralc(*generate, *hot, *narrow))["tokens"] == greedy, narrow
    assert len(set(greedy)) < len(greedy), "this text must repeat itself for penalties to show"
    for penalty in ("--repetition-penalty", "--presence-penalty", "--frequency-penalty"):
        tokens = reported(mistralc(*generate, penalty, "50"))["tokens"]
        assert len(set(tokens)) == len(tokens), f"{penalty} 50 leaves no token twice"
    forced = reported(mistralc(*generate, "--logit-bias", "70=1000"))["tokens"]
    assert set(forced) == {70}


def test_log_probabilities_are_reported_for_every_token(
    mistralc: Command, sliding_bundle: Path
) -> None:
    generate = ("generate", sliding_bundle, PROMPT, "-n", "5", "-t", "0", "--json")
    result = reported(mistralc(*generate, "--logprobs", "3"))
    assert [entry["token_id"] for entry in result["logprobs"]] == result["tokens"]
    for entry in result["logprobs"]:
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0] == [entry["token_id"], entry["logprob"]], "greedy"
        assert entry["logprob"] < 0
    assert "logprobs" not in reported(mistralc(*generate))


def test_a_sliding_bundle_writes_on_past_its_ring(mistralc: Command, sliding_bundle: Path) -> None:
    ring = read_manifest(sliding_bundle).ring.capacity(8)
    many = 20 * ring
    result = reported(mistralc("generate", sliding_bundle, PROMPT, "-n", many, *NO_END, "--json"))
    assert len(result["tokens"]) == many
    assert result["finish_reason"] == "length"


def test_a_prompt_of_many_rings_is_read_by_a_sliding_bundle(
    mistralc: Command, sliding_bundle: Path
) -> None:
    prompt = "long " * 100
    result = reported(mistralc("generate", sliding_bundle, "--json", "-n", "2", prompt))
    assert result["timings"]["prompt_tokens"] == 501


def test_a_bundle_without_a_window_ends_at_its_context(
    mistralc: Command, plain_bundle: Path
) -> None:
    generate = ("generate", plain_bundle, *NO_END, "--json")
    result = reported(mistralc(*generate, "-n", 10 * CONTEXT, PROMPT))
    assert result["finish_reason"] == "length"
    # Every position is taken, and the token after the last one needs none of its own.
    assert result["timings"]["prompt_tokens"] + len(result["tokens"]) == CONTEXT + 1
    full = reported(mistralc(*generate, "-n", 10, "x" * (CONTEXT - 1)))
    assert (len(full["tokens"]), full["finish_reason"]) == (1, "length")


def test_a_checkpoints_own_sampling_is_the_default_and_the_users_goes_before_it() -> None:
    defaults = {"temperature": 0.7, "top_k": 40, "eos_token_id": [2]}
    given = options.chosen(top_k=5, seed=None)
    params = sampling_params(defaults, given)
    assert (params.temperature, params.top_k, params.seed) == (0.7, 5, None)
    greedy = sampling_params({**defaults, "do_sample": False}, {})
    assert greedy.temperature == 0
    assert sampling_params({}, {}).temperature == 0


# inspect


def test_inspect_says_what_a_bundle_is(mistralc: Command, sliding_bundle: Path) -> None:
    out = told(mistralc("inspect", sliding_bundle))
    for fact in ("tiny (huggingface)", "102,720", "16 slots, chunk 8", "none: the text may run on"):
        assert fact in out
    assert "passed against the checkpoint" in out


def test_inspect_reports_the_manifest_and_what_follows_from_it(
    mistralc: Command, plain_bundle: Path
) -> None:
    facts = reported(mistralc("inspect", plain_bundle, "--json"))
    manifest = json.loads((plain_bundle / "manifest.json").read_text(encoding="utf-8"))
    del manifest["manifest_sha256"]
    assert facts["manifest"].items() >= manifest.items()
    assert facts["parameters"] == 102_720
    assert facts["capacities"] == {"None": CONTEXT}
    assert facts["endless"] is False
    # Two layers with a key and a value of 2 heads x 16 in float32, at every one of the slots.
    assert facts["ring_bytes"] == 2 * 2 * 2 * 16 * 4 * CONTEXT


# verify


def test_verify_records_its_result_in_the_manifest_and_the_report(
    mistralc: Command, sliding_bundle: Path, copy_of: Copy
) -> None:
    bundle = copy_of(sliding_bundle)
    result = reported(mistralc("verify", bundle, "--json"))
    assert result["passed"] is True
    assert result["against"] == "its own weights"
    assert {case["case"] for case in result["cases"]} == {"W-1", "W", "W+1", "2W+3", "turns"}
    assert open_bundle(bundle).manifest.verification == result
    report = (bundle / "report" / "verify.md").read_text(encoding="utf-8")
    assert "with its own weights" in report
    assert "Verdict: passed" in report


def test_verify_prints_a_table_for_people(
    mistralc: Command, plain_bundle: Path, copy_of: Copy
) -> None:
    out = told(mistralc("verify", copy_of(plain_bundle), "--short"))
    assert re.search(r"\| chunk-1 \| 7 \| \d\.\d\de-\d\d ", out)
    assert "Verdict: passed" in out


@pytest.mark.usefixtures("kept_traces")
def test_a_short_verification_leaves_out_long_cases(
    mistralc: Command, plain_checkpoint: Path, tmp_path: Path
) -> None:
    from exporter.checks.texts import SHORT

    bundle = tmp_path / "bundle"
    told(mistralc("export", plain_checkpoint, "-o", bundle, "--chunk", SHORT, "-q"))
    short = reported(mistralc("verify", bundle, "--short", "--json"))["cases"]
    whole = reported(mistralc("verify", bundle, "--json"))["cases"]
    assert max(case["tokens"] for case in short) <= SHORT
    assert max(case["tokens"] for case in whole) == 2 * SHORT + 3


def test_verify_compares_with_the_checkpoint_that_it_is_given(
    mistralc: Command, sliding_bundle: Path, sliding_checkpoint: Path, copy_of: Copy
) -> None:
    bundle = copy_of(sliding_bundle)
    result = reported(mistralc("verify", bundle, "--against", sliding_checkpoint, "--json"))
    assert result["against"] == "the checkpoint"
    assert result["passed"] is True


def test_verify_lists_nothing_but_its_own_report_anew(
    mistralc: Command, sliding_bundle: Path, copy_of: Copy
) -> None:
    bundle = copy_of(sliding_bundle)
    (bundle / "notes.txt").write_text("not part of the bundle", encoding="utf-8")
    before = read_manifest(bundle).files
    told(mistralc("verify", bundle, "--short"))
    after = read_manifest(bundle).files
    assert {name for name in after if after[name] != before.get(name)} == {"report/verify.md"}


def test_weights_changed_together_with_their_hashes_fail_verification(
    mistralc: Command, sliding_bundle: Path, sliding_checkpoint: Path, copy_of: Copy
) -> None:
    bundle = copy_of(sliding_bundle)
    weights = bundle / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    begin, end = header["model.layers.0.mlp.up_proj.weight"]["data_offsets"]
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + begin : start + end] = bytes(end - begin)  # all zeros
    weights.write_bytes(data)
    assert_verify_fails(mistralc, bundle, "--against", sliding_checkpoint)


def test_a_graph_changed_together_with_its_hash_fails_verification(
    mistralc: Command, sliding_bundle: Path, copy_of: Copy
) -> None:
    bundle = copy_of(sliding_bundle)
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    window = [
        tensor
        for tensor in model.graph.initializer
        if not tensor.external_data and onnx.numpy_helper.to_array(tensor).tolist() == 8
    ]
    assert len(window) == 1, "the window is to be one constant of the graph"
    window[0].CopyFrom(
        onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(window[0]) - 1, window[0].name)
    )
    onnx.save(model, bundle / "model.onnx")
    assert_verify_fails(mistralc, bundle)


def assert_verify_fails(mistralc: Command, bundle: Path, *arguments: object) -> None:
    """Make the bundle's hashes right again, and see that verify finds it wrong and says so."""
    manifest = replace(read_manifest(bundle), files=list_files(bundle))
    (bundle / "manifest.json").write_text(manifest.to_text(), encoding="utf-8")
    assert told(mistralc("inspect", bundle)), "the hashes are to be right, or nothing is shown"
    ended = mistralc("verify", bundle, *arguments)
    assert ended.code == 1
    assert "Verdict: FAILED" in ended.out
    assert "does not compute what the checkpoint does" in ended.err
    verification = open_bundle(bundle).manifest.verification
    assert verification is not None
    assert verification["passed"] is False
    assert "FAILED" in (bundle / "report" / "verify.md").read_text(encoding="utf-8")
    assert "FAILED" in told(mistralc("inspect", bundle))


# chat


def test_a_chat_answers_each_line_and_keeps_the_ring(mistralc: Command, plain_bundle: Path) -> None:
    lines = "hi\n/stats\nok\n/stats\n/quit\nnever read\n"
    ended = mistralc("chat", plain_bundle, "-n", "4", "-t", "0", stdin=lines.encode())
    stats = statistics_of(told(ended))
    template = len("[INST] ") + len(" [/INST]")
    first, second = stats
    assert first["prompt_tokens"] == 1 + template + 2
    assert first["cached_tokens"] == 0
    assert second["cached_tokens"] >= first["prompt_tokens"], "the first turn was read again"
    assert second["prompt_tokens"] > second["cached_tokens"], "the new question is not in it"


def statistics_of(out: str) -> list[dict[str, float]]:
    """What each /stats printed."""
    pairs = re.findall(r"^(\w+) +([\d,.]+|-)$", out, re.MULTILINE)
    names = [name for name, _ in pairs]
    width = names.index("decode_tokens_per_s") + 1 - names.index("prompt_tokens")
    assert len(pairs) % width == 0
    numbers = [(name, float(value.replace(",", "").replace("-", "nan"))) for name, value in pairs]
    return [dict(numbers[i : i + width]) for i in range(0, len(numbers), width)]


def test_a_turn_taken_back_costs_nothing_when_it_is_asked_again(
    mistralc: Command, plain_bundle: Path
) -> None:
    lines = "hi\nfirst\n/undo\nother\n/stats\n"
    ended = mistralc("chat", plain_bundle, "-n", "2", stdin=lines.encode())
    assert ended.code == 0, ended.err
    (stats,) = statistics_of(ended.out)
    # After /undo the chat is: hi, its answer, other. Only from "other" on it is new.
    assert stats["prompt_tokens"] - stats["cached_tokens"] <= len("other [/INST]")


def test_a_new_chat_has_forgotten_the_old_one(mistralc: Command, plain_bundle: Path) -> None:
    lines = "hi\n/stats\nok\n/new\nhi\n/stats\n"
    out = told(mistralc("chat", plain_bundle, "-n", "2", stdin=lines.encode()))
    before, after = statistics_of(out)
    assert before["prompt_tokens"] == after["prompt_tokens"]
    answers = [line for line in out.splitlines() if line and not re.match(r"\w+ +[\d,.-]+$", line)]
    assert answers[0] == answers[-1], "the same question, alone again, has the same answer"


def test_a_sliding_chat_keeps_its_ring_while_that_reaches_far_enough(
    mistralc: Command, sliding_bundle: Path
) -> None:
    lines = "".join(f"question {i}\n" for i in range(20)) + "/stats\n"
    out = told(mistralc("chat", sliding_bundle, "-n", "2", stdin=lines.encode()))
    (stats,) = statistics_of(out)
    assert stats["cached_tokens"] > 300, "a long chat was read from its beginning every turn"
    assert stats["prompt_tokens"] - stats["cached_tokens"] < 40


def test_a_chat_that_outgrows_the_context_says_so_and_goes_on_after_new(
    mistralc: Command, plain_bundle: Path
) -> None:
    lines = "x" * CONTEXT + "\nhi\n/stats\n/quit\n"
    ended = mistralc("chat", plain_bundle, "-n", "2", stdin=lines.encode())
    assert ended.code == 0
    assert ended.err.count(f"this bundle holds {CONTEXT} in all") == 1
    assert "/new starts over" in ended.err
    (stats,) = statistics_of(ended.out)
    assert stats["prompt_tokens"] < CONTEXT, "what was refused must not stay in the chat"


def test_an_unknown_command_in_a_chat_lists_the_commands(
    mistralc: Command, plain_bundle: Path
) -> None:
    out = told(mistralc("chat", plain_bundle, stdin=b"/nonsense\n\n/stats\n"))
    assert out.count("/undo") == 2, "before any answer there is nothing that /stats could tell"


# bench


def test_bench_reports_what_it_ran_on_and_what_it_measured(
    mistralc: Command, sliding_bundle: Path
) -> None:
    bench = ("bench", sliding_bundle, "--prompt-tokens", "20", "--new-tokens", "10")
    result = reported(mistralc(*bench, "--repeat", "2", "--json"))
    assert {"processor", "cores", "python", "onnxruntime"} <= result["machine"].keys()
    assert result["prefill_tokens_per_s"] == pytest.approx(20 / result["ttft_s"])
    assert result["decode_tokens_per_s"] > 0
    assert result["rounds"] == 2
    assert 0 < result["step_ms_median"] <= result["step_ms_p95"] <= result["step_ms_p99"]
    assert 0 < result["host_share"] < 1
    spec = read_manifest(sliding_bundle).model
    window = spec.layer_windows[0] or 0
    ring = 2 * 4 * spec.num_hidden_layers * spec.num_key_value_heads * spec.head_dim * window
    weights = 4 * (spec.num_parameters - (spec.vocab_size - 1) * spec.hidden_size)
    assert result["bytes_per_token"] == weights + ring, "all weights, one row of the embedding"
    # In a process of its own, whose memory is the command's.
    command = [sys.executable, "-m", "mistralc", *bench, "--repeat", "1", "--json"]
    one = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)
    rate = one["decode_tokens_per_s"] * one["bytes_per_token"]
    share = rate / one["read_bandwidth_bytes_per_s"]
    assert one["bandwidth_share"] == pytest.approx(share)
    assert one["bytes_per_token"] < one["peak_memory_bytes"] < BYTES, "not what is read to compare"
    assert 0 <= one["huge_page_bytes"] <= one["peak_memory_bytes"]
    lines = told(mistralc(*bench, "--repeat", "1")).splitlines()
    assert any(re.fullmatch(r"decode_tokens_per_s: [\d,]+\.\d+", line) for line in lines)


def test_bench_decodes_several_sequences_side_by_side(
    mistralc: Command, plain_bundle: Path
) -> None:
    bench = ("bench", plain_bundle, "--prompt-tokens", "20", "--new-tokens", "10", "--batch", "3")
    result = reported(mistralc(*bench, "--repeat", "1", "--json"))
    assert result["batch"] == 3
    assert result["decode_tokens_per_s"] == pytest.approx(3 / (1e-3 * result["step_ms_mean"]))
    ended = mistralc(*bench, "--positions", "9")
    assert ended.code == 2
    assert "leave --batch out" in ended.err


def test_guessing_ahead_changes_no_token(mistralc: Command, sliding_bundle: Path) -> None:
    ask = ("generate", sliding_bundle, "to be or not to be or not", "-n", "60", "--json")
    ask = (*ask, "--temperature", "0.3", "--seed", "4")
    plain, guessed = (reported(mistralc(*ask, "--speculate", n)) for n in ("0", "6"))
    assert plain["tokens"] == guessed["tokens"]


def test_bench_draws_latency_against_position(
    mistralc: Command, sliding_bundle: Path, tmp_path: Path
) -> None:
    plot = tmp_path / "latency.png"
    result = reported(
        mistralc("bench", sliding_bundle, "--positions", "300", "--plot", plot, "--json")
    )
    assert result["positions"] == 300
    assert result["ring_full_at"] == 16
    assert result["median_step_ms_at_end"] > 0
    data = plot.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(data[i : i + 4]) for i in (16, 20))
    assert width > 500
    assert height > 300


def test_bench_refuses_to_divide_by_tokens_that_were_never_made(
    mistralc: Command, plain_bundle: Path
) -> None:
    new = ("--new-tokens", "20", "--repeat", "1")
    ended = mistralc("bench", plain_bundle, "--prompt-tokens", CONTEXT - 6, *new)
    assert ended.code == 1
    assert "ended at 7 tokens of 20" in ended.err


# The program


def test_help_of_every_command_comes_without_a_backend_or_torch() -> None:
    code = f"""
import sys
import mistralc
for command in {["", *COMMANDS]!r}:
    sys.argv = ["mistralc", *([command] if command else []), "--help"]
    try:
        mistralc.main()
    except SystemExit as ended:
        assert ended.code == 0, command
heavy = {{"torch", "onnx", "onnx_ir", "onnxruntime", "safetensors", "jinja2", "tokenizers",
         "fastapi", "llguidance", "uvicorn"}}
loaded = heavy & sys.modules.keys()
assert not loaded, f"--help has imported {{loaded}}"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    help_text = done.stdout.decode()
    for command in COMMANDS:
        assert f"{command} [OPTIONS]" in help_text


def test_generating_imports_neither_torch_nor_onnx(sliding_bundle: Path) -> None:
    # A production host has none of them; its own process shows it, this one has them all.
    code = """
import sys
import mistralc
try:
    mistralc.main()
except SystemExit as ended:
    assert not ended.code
built = {"torch", "onnx", "onnx_ir", "onnxscript", "safetensors", "gguf"} & sys.modules.keys()
assert not built, f"generate has imported {built}"
"""
    command = [sys.executable, "-c", code, "generate", sliding_bundle, "--chat", "hi", "-n", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b""


def test_the_version_is_that_of_the_distribution(mistralc: Command) -> None:
    assert re.fullmatch(r"mistralc \d+\.\d+\.\d+\n", told(mistralc("--version")))


def test_the_installed_command_exits_with_its_status(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mistralc", "inspect", tmp_path / "nothing"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 1
    assert done.stdout == b""
    assert done.stderr.startswith(b"mistralc: There is no bundle at ")


def test_debug_shows_the_traceback_that_is_otherwise_spared(
    mistralc: Command, tmp_path: Path
) -> None:
    assert "Traceback" not in mistralc("inspect", tmp_path).err
    with pytest.raises(Exception, match="is not a bundle"):
        mistralc("inspect", tmp_path, "--debug")
