"""The `bench` command."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from graphs.manifest import read_manifest
from runtime.system.memory_bandwidth import BYTES
from tests.conftest import CONTEXT, Command
from tests.support.commands import json_output, succeeded

ROOT = Path(__file__).resolve().parents[3]


def test_bench_reports_the_machine_and_its_measurements(
    mistralc: Command, sliding_bundle: Path
) -> None:
    bench = ("bench", sliding_bundle, "--prompt-tokens", "20", "--new-tokens", "10")
    result = json_output(mistralc(*bench, "--repeat", "2", "--json"))
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
    assert result["bytes_per_token"] == weights + ring, "all weights but one row of the embedding"
    # In its own process, whose memory is that of the command.
    command = [sys.executable, "-m", "mistralc", *bench, "--repeat", "1", "--json"]
    one = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)
    rate = one["decode_tokens_per_s"] * one["bytes_per_token"]
    share = rate / one["read_bandwidth_bytes_per_s"]
    assert one["bandwidth_share"] == pytest.approx(share)
    assert one["bytes_per_token"] < one["peak_memory_bytes"] < BYTES, (
        "the test buffer must not count"
    )
    assert 0 <= one["huge_page_bytes"] <= one["peak_memory_bytes"]
    lines = succeeded(mistralc(*bench, "--repeat", "1")).splitlines()
    assert any(re.fullmatch(r"decode_tokens_per_s: [\d,]+\.\d+", line) for line in lines)


def test_bench_decodes_a_batch(mistralc: Command, plain_bundle: Path) -> None:
    bench = ("bench", plain_bundle, "--prompt-tokens", "20", "--new-tokens", "10", "--batch", "3")
    result = json_output(mistralc(*bench, "--repeat", "1", "--json"))
    assert result["batch"] == 3
    assert result["decode_tokens_per_s"] == pytest.approx(3 / (1e-3 * result["step_ms_mean"]))
    ended = mistralc(*bench, "--positions", "9")
    assert ended.code == 2
    assert "leave --batch out" in ended.err


def test_bench_plots_latency_by_position(
    mistralc: Command, sliding_bundle: Path, tmp_path: Path
) -> None:
    plot = tmp_path / "latency.png"
    result = json_output(
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


def test_bench_fails_if_the_context_ends_before_all_new_tokens(
    mistralc: Command, plain_bundle: Path
) -> None:
    new = ("--new-tokens", "20", "--repeat", "1")
    ended = mistralc("bench", plain_bundle, "--prompt-tokens", CONTEXT - 6, *new)
    assert ended.code == 1
    assert "ended after 7 of 20 tokens" in ended.err
