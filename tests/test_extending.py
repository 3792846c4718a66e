"""Add a target and a precision by the steps of docs/extending.md, and run what comes out.

Nothing else may have to be changed for them: that is what the tables are for.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from exporter.export import export
from exporter.options import ExportOptions
from graphs.build import Build
from graphs.passes.pipeline import PASSES, PORTABLE
from graphs.precisions import PRECISIONS, Precision
from graphs.targets import TARGETS
from runtime.backends.onnxruntime_cpu import OrtSession
from runtime.decoding.sampling import SamplingParams
from runtime.load import SESSIONS, Files, load
from tests.conftest import Command

ROOT = Path(__file__).resolve().parents[1]
GREEDY = SamplingParams(temperature=0.0)


def answer(bundle: Path) -> list[int]:
    """The next eight tokens after a short prompt."""
    generator = load(bundle).generator
    steps = generator.generate(generator.feed([1, 2, 3]), GREEDY, max_new_tokens=8)
    return [step.token_id for step in steps]


def test_a_target_is_an_entry_its_passes_and_its_session(
    plain_checkpoint: Path, plain_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    mistralc: Command,
) -> None:  # fmt: skip
    """A target that runs the portable graph on ONNX Runtime CPU, in float32 only."""

    def opened(
        directory: Path, build: Build, files: Files, batch: int, threads: int | None
    ) -> OrtSession:
        return OrtSession(directory / "model.onnx", build.spec, batch=batch, threads=threads)

    entry = replace(
        TARGETS["cpu"], name="toy", title="a toy", activations={"fp32": "float32"},
        full_attention="masked", ring_grows=False, supports_batch_invariance=False,
    )  # fmt: skip
    monkeypatch.setitem(TARGETS, "toy", entry)  # type: ignore[arg-type]
    monkeypatch.setitem(PASSES, "toy", PORTABLE)  # type: ignore[arg-type]
    monkeypatch.setitem(SESSIONS, "toy", opened)  # type: ignore[arg-type]

    bundle = tmp_path / "bundle"
    options = ExportOptions(target="toy", context=96, chunk=8)
    manifest = export(str(plain_checkpoint), bundle, options)
    assert manifest.verification is not None
    assert manifest.verification["passed"], "verified like any target that needs no GPU"
    assert "group_query_attention" not in manifest.passes
    assert answer(bundle) == answer(plain_bundle)
    planned = mistralc("plan", plain_checkpoint, "--target", "toy")
    assert planned.code == 0, planned.err
    assert "fp32 for toy" in planned.out
    refused = mistralc("plan", plain_checkpoint, "--target", "toy", "--precision", "int4wo")
    assert refused.code == 2
    assert "the target toy takes fp32" in refused.err
    assert mistralc("doctor", bundle).code == 0
    assert mistralc("inspect", bundle).code == 0


def test_a_precision_is_an_entry_and_its_name_in_the_targets_that_take_it(
    plain_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistralc: Command
) -> None:
    """4-bit weights without zero points. Its codes are old, so no arithmetic is added."""
    entry = Precision(name="int4sym", summary="4-bit weights, symmetric", codes="int4",
                      blockwise=True)  # fmt: skip
    cpu = TARGETS["cpu"]
    monkeypatch.setitem(PRECISIONS, "int4sym", entry)  # type: ignore[arg-type]
    monkeypatch.setitem(
        TARGETS,  # type: ignore[arg-type]
        "cpu",
        replace(cpu, activations={**cpu.activations, "int4sym": "float32"}),
    )
    bundle = tmp_path / "bundle"
    options = ExportOptions(precision="int4sym", context=96, chunk=8)
    manifest = export(str(plain_checkpoint), bundle, options)
    schemes = manifest.storage.schemes
    assert {scheme.offset for scheme in schemes.values()} == {"none"}
    assert schemes["model.layers.0.mlp.up_proj.weight"].codes == "int4"
    assert len(answer(bundle)) == 8
    planned = mistralc("plan", plain_checkpoint, "--target", "cpu", "--precision", "int4sym")
    assert planned.code == 0, planned.err
    refused = mistralc("export", plain_checkpoint, "--target", "rtx", "--precision", "int4sym")
    assert refused.code == 2
    assert "the target rtx takes fp16" in refused.err


@pytest.mark.parametrize("module", ["graphs.passes.pipeline", "runtime.load"])
def test_a_target_that_is_missing_from_a_table_is_found_when_the_table_is_imported(
    module: str,
) -> None:
    code = (
        "from graphs.targets import TARGETS; from dataclasses import replace; "
        f"TARGETS['toy'] = replace(TARGETS['cpu'], name='toy'); import {module}"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "graphs.targets.TARGETS differ in toy" in done.stderr


def test_a_precision_that_no_target_takes_is_found_when_the_tables_are_imported() -> None:
    code = (
        "from graphs.precisions import PRECISIONS, Precision; "
        "PRECISIONS['toy'] = Precision(name='toy', summary=''); import graphs.targets"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no target is built in ['toy']" in done.stderr
