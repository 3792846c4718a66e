"""`--lora` in every command that takes a checkpoint."""

from pathlib import Path

import pytest
import torch

from exporter.checkpoint.open import open_checkpoint
from graphs.manifest import read_manifest
from runtime.bundle.open import open_bundle
from tests.conftest import Command
from tests.support.commands import json_output, refused, succeeded

pytest.importorskip("peft")
from tests.support import adapters


@pytest.fixture(scope="module")
def adapter(sliding_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "my-adapter"
    return adapters.make(sliding_checkpoint, folder, adapters.FORMS["LoRA"])


def test_a_bundle_holds_the_merged_weights_and_says_so(
    mistralc: Command, sliding_checkpoint: Path, adapter: Path, tmp_path: Path
) -> None:
    bundle, given = tmp_path / "bundle", f"{adapter}=0.5"
    out = json_output(
        mistralc("export", sliding_checkpoint, "--lora", given, "-o", bundle, "--json")
    )
    assert out["manifest"]["checkpoint"]["adapters"] == "my-adapter times 0.5"
    opened = open_checkpoint(sliding_checkpoint, [given])
    manifest = open_bundle(bundle).manifest
    assert manifest.checkpoint["fingerprint"] == opened.fingerprint()
    from safetensors import safe_open

    with safe_open(bundle / "weights.safetensors", "pt") as file:
        for name in opened.spec.weight_shapes():
            assert torch.equal(file.get_tensor(name), opened.tensor(name)), name
    assert "with my-adapter times 0.5 merged" in succeeded(mistralc("inspect", bundle))
    result = json_output(mistralc("verify", bundle, "--short", "--json",
                                  "--against", sliding_checkpoint, "--lora", given))  # fmt: skip
    assert result["passed"] is True
    refused(mistralc("verify", bundle, "--short", "--against", sliding_checkpoint),
            "with the adapters my-adapter times 0.5", code=1)  # fmt: skip
    refused(mistralc("verify", bundle, "--short", "--lora", given), "without --against", code=2)
    measured = json_output(
        mistralc("eval", bundle, "--against", sliding_checkpoint, "--lora", given, "--json",
                 "--limit", "1", "--length", "16")
    )  # fmt: skip
    assert measured["kl"] < 1e-4
    refused(mistralc("eval", bundle, "--lora", given), "without --against", code=2)


def test_a_merged_model_is_calibrated_and_quantized(
    mistralc: Command, sliding_checkpoint: Path, adapter: Path, tmp_path: Path
) -> None:
    table, merged = tmp_path / "table", ["--lora", adapter]
    succeeded(mistralc("calibrate", sliding_checkpoint, "-o", table, *merged, "--precision",
                       "int8", "--samples", "2", "--length", "16"))  # fmt: skip
    quantized = ["--precision", "int8", "--calibration", table, "--max-ppl-increase", "10"]
    refused(mistralc("export", sliding_checkpoint, "-o", tmp_path / "a", *quantized),
            "fingerprint", code=1)  # fmt: skip
    succeeded(mistralc("export", sliding_checkpoint, "-o", tmp_path / "b", *merged, *quantized))
    assert read_manifest(tmp_path / "b").checkpoint["adapters"] == "my-adapter"


def test_plan_takes_the_vocabulary_of_an_adapter_and_a_directory_without_weights(
    mistralc: Command, sliding_checkpoint: Path, tmp_path: Path
) -> None:
    adapter = adapters.make(sliding_checkpoint, tmp_path / "larger", adapters.FORMS["resized"])
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes(
        (sliding_checkpoint / "config.json").read_bytes()
    )
    plain, *larger = (
        json_output(mistralc("plan", source, *extra, "--target", "cpu", "--json"))["spec"]
        for source, extra in (
            (sliding_checkpoint, []),
            (sliding_checkpoint, ["--lora", adapter]),
            (tmp_path / "bare", ["--lora", adapter]),
        )
    )
    assert [one["vocab_size"] for one in larger] == [plain["vocab_size"] + 8] * 2
