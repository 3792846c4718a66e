"""Every command takes checkpoints that are quantized already."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from exporter.checkpoint.open import open_checkpoint
from exporter.decoder.load import load_decoder
from exporter.decoder.model import logits_at
from exporter.export import ExportOptions, export
from graphs.manifest import read_manifest
from tests.conftest import Command
from tests.support import tiny
from tests.support.commands import json_output, refused, succeeded
from tests.support.make_checkpoint import write_checkpoint
from tests.support.quantized_forms import FORMS, SPEC, Written, write_form

Write = Callable[[str], Written]
GATE = ("--max-ppl-increase", 0.5)  # a random model: only that the two are about equal


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    done: dict[str, Written] = {}

    def written(name: str) -> Written:
        if name not in done:
            form = next(form for form in FORMS if form.name == name)
            done[name] = write_form(tmp_path_factory.mktemp("form") / "model", form)
        return done[name]

    return written


@pytest.mark.usefixtures("kept_traces")
@pytest.mark.parametrize(
    ("name", "precision", "told"),
    [
        ("AWQ", "int4wo", "14 weights of awq 4 bits, group 32: codes carried over bit for bit"),
        ("FP8 static", "fp8", "inputs rounded with the checkpoint's scales"),
        ("bitsandbytes nf4", "fp32", "the values of nf4 come from a table, not from integers"),
    ],
)
def test_every_command_takes_a_quantized_checkpoint(
    mistralc: Command, write: Write, tmp_path: Path, name: str, precision: str, told: str
) -> None:
    path, bundle = write(name).path, tmp_path / "bundle"
    planned = json_output(mistralc("plan", path, "--target", "cpu", "--json"))
    assert planned["precision"] == precision
    assert any(told in line for line in planned["codes"])
    table = succeeded(mistralc("plan", path, "--target", "cpu"))
    assert told in " ".join(table.split())  # a narrow terminal wraps it
    out = succeeded(mistralc("export", path, "-o", bundle, "-q", *GATE))
    assert told in out
    manifest = read_manifest(bundle)
    assert manifest.precision == precision
    assert manifest.checkpoint["codes"].splitlines() == planned["codes"]
    written = manifest.files["weights.safetensors"].size
    assert planned["weight_bytes"] == pytest.approx(written, abs=8000)  # the header
    assert manifest.verification is not None
    assert manifest.verification["passed"]
    against = mistralc("verify", bundle, "--against", path, "--short", "--json")
    assert json_output(against)["passed"]
    text = tmp_path / "text.txt"
    text.write_text("The ring turns. " * 20)
    measured = mistralc("eval", bundle, "--against", path, "--text", text, "--length", 40,
                        "--limit", 2, "--json")  # fmt: skip
    assert json_output(measured)["text"]["windows"] == 2


@pytest.mark.usefixtures("kept_traces")
def test_a_quantized_checkpoint_is_calibrated_like_any_other(
    mistralc: Command, write: Write, tmp_path: Path
) -> None:
    path, table, text = write("AWQ").path, tmp_path / "table", tmp_path / "text.txt"
    text.write_text("The ring turns and turns. " * 40)
    succeeded(mistralc("calibrate", path, "-o", table, "--precision", "int8", "--text", text,
                       "--length", 64, "--samples", 4, "-q"))  # fmt: skip
    out = succeeded(mistralc("export", path, "-o", tmp_path / "bundle", "--precision", "int8",
                             "--calibration", table, "-q", *GATE))  # fmt: skip
    assert "14 weights of awq 4 bits, group 32: dequantized exactly and rounded to int8" in out


def test_a_precision_with_rounded_inputs_needs_a_table_unless_the_checkpoint_has_its_scales(
    mistralc: Command, write: Write, tmp_path: Path
) -> None:
    ended = mistralc("export", write("AWQ").path, "-o", tmp_path / "b", "--precision", "fp8")
    refused(ended, "mistralc calibrate", code=2)
    ended = mistralc(
        "export", write("FP8 static").path, "-o", tmp_path / "b", "--precision", "int8"
    )
    refused(ended, "mistralc calibrate", code=2)


@pytest.mark.parametrize("name", ["AWQ", "GPTQ act-order", "FP8 in blocks", "bitsandbytes nf4"])
def test_logits_are_those_of_the_librarys_dequantized_weights(write: Write, name: str) -> None:
    written = write(name)
    ours = load_decoder(SPEC, open_checkpoint(written.path).tensor)
    plain = open_checkpoint(write_checkpoint(written.path.parent / "f", SPEC, dtype="float16"))

    def library(weight: str) -> torch.Tensor:
        made = written.made.get(weight)
        return plain.tensor(weight) if made is None else made.weight

    ids = torch.from_numpy(tiny.tokens(SPEC, 40))
    got = logits_at(ours, ids, torch.arange(40))
    expected = logits_at(load_decoder(SPEC, library), ids, torch.arange(40))
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.usefixtures("kept_traces")
def test_nothing_is_said_of_a_checkpoint_of_floats(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", SPEC)
    manifest = export(str(path), tmp_path / "bundle", ExportOptions())
    assert manifest.checkpoint.keys() == {"name", "format", "fingerprint"}


def test_plan_of_a_configuration_alone_says_that_the_codes_are_not_known(
    write: Write, mistralc: Command, tmp_path: Path
) -> None:
    source = write("AWQ").path
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    bare, whole = (
        json_output(mistralc("plan", path, "--target", "cpu", "--json"))
        for path in (tmp_path, source)
    )
    assert bare["precision"] == "fp32"
    assert any("weights are quantized (awq" in note for note in bare["notes"]), bare["notes"]
    assert whole["precision"] == "int4wo"
    assert not any("weights are quantized" in note for note in whole["notes"])
