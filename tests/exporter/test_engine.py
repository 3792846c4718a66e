"""Engines: built for real by TensorRT-RTX on a machine without a GPU, and audited."""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

from exporter import export as exporting
from exporter.checkpoint.open import open_checkpoint
from exporter.engine import audit as auditing
from exporter.engine.progress import Phases
from exporter.engine.request import profiles
from exporter.export import export
from exporter.options import EngineOptions, ExportOptions
from exporter.quantization.calibration_table import CalibrationTable
from graphs.errors import MistralcError, UsageError
from graphs.manifest import Manifest, read_manifest
from graphs.quant_scheme import default_scheme, groups
from graphs.spec import RingSpec
from tests.conftest import Command
from tests.support import tiny
from tests.support.engines import RING, SPEC, compile_graph, reproduced, write_graph
from tests.support.make_checkpoint import tiny_spec, write_checkpoint

if importlib.util.find_spec("tensorrt_rtx") is None:
    pytest.skip("tensorrt_rtx is not installed: pip install 'mistralc[rtx]'",
                allow_module_level=True)  # fmt: skip

ROOT = Path(__file__).resolve().parents[2]

Files = frozenset[tuple[str, bytes]]

pytestmark = pytest.mark.usefixtures("kept_traces")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("engine") / "checkpoint", SPEC, dtype="bf16")


@pytest.fixture(scope="module", params=["fp16", "bf16"])
def engine(
    request: pytest.FixtureRequest,
    checkpoint: Path,
    kept_traces: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Manifest]:
    bundle = tmp_path_factory.mktemp("engine") / "bundle"
    options = ExportOptions(target="rtx", precision=request.param)
    return bundle, export(str(checkpoint), bundle, options)


def test_an_engine_bundle_holds_a_plan_and_no_graph(engine: tuple[Path, Manifest]) -> None:
    bundle, manifest = engine
    assert "engine.plan" in manifest.files
    assert not {"model.onnx", "weights.safetensors"} & set(manifest.files)
    assert not (bundle / "graph").exists()
    assert manifest.verification is None, "without a GPU nothing was run, and nothing is claimed"


def test_the_audit_finds_attention_fused_caches_in_place_and_weights_once(
    engine: tuple[Path, Manifest],
) -> None:
    bundle, manifest = engine
    facts = manifest.engine
    assert facts is not None
    layers = SPEC.num_hidden_layers
    assert (facts["attention_fused"], facts["attention"]) == (layers, layers)
    assert (facts["caches_in_place"], facts["caches"]) == (2 * layers, 2 * layers)
    assert facts["caches_copied"] == facts["caches_repeated"] == 0
    assert facts["interface"] == "matches the contract"
    assert facts["faults"] == []
    plan = (bundle / "engine.plan").read_bytes()
    assert facts["plan_sha256"] == hashlib.sha256(plan).hexdigest()
    assert facts["plan_bytes"] == len(plan)
    assert facts["weight_bytes"] == 2 * SPEC.num_parameters
    # A plan also has kernels and tables, 6.1 MB here; the output layer has 4.2 MB.
    assert 2 * SPEC.num_parameters < len(plan) < 2 * SPEC.num_parameters + 6_500_000
    assert facts["stored_twice"] == 0


def test_the_same_graph_gives_the_same_plan_bit_for_bit(tmp_path: Path) -> None:
    def build(name: str) -> bytes:
        (tmp_path / name).mkdir(exist_ok=True)
        write_graph(tmp_path / name)
        compile_graph(tmp_path / name)
        return (tmp_path / name / "engine.plan").read_bytes()

    assert reproduced([partial(build, "first"), partial(build, "second")])


def test_the_plan_does_not_depend_on_the_modules_that_were_imported_before_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The plan lists the outputs of this model in the order of their addresses: before the heap was
    # fixed, it depended on these modules.
    spec = tiny_spec(window=13)
    model = tiny.build(spec, "rtx", ring=RingSpec(chunk=64, context=512), activation="float16")
    write_graph(tmp_path, model)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def build(modules: str) -> str:
        (tmp_path / "sitecustomize.py").write_text(f"import {modules}\n", encoding="utf-8")
        return compile_graph(tmp_path, model).sha256

    modules = ("json", "decimal", "email.message, html.parser", "http.client, xml.dom.minidom")
    assert reproduced([partial(build, one) for one in modules])


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_engine_bundles_of_one_checkpoint_are_equal_byte_for_byte_across_processes(
    precision: str, checkpoint: Path, tmp_path: Path
) -> None:
    # Another process, hash seed, time zone and directory: what might leak into files.
    def build(name: str, variables: dict[str, str]) -> Files:
        bundle = tmp_path / name
        command = [sys.executable, "-m", "mistralc", "export", checkpoint, "-o", bundle, "--force",
                   "--target", "rtx", "--precision", precision]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr.decode()
        return contents(bundle)

    elsewhere = {"PYTHONHASHSEED": "1", "TZ": "Asia/Kathmandu"}
    builds = [partial(build, "first", {}), partial(build, "elsewhere/another-name", elsewhere)]
    assert reproduced(builds)
    names = {name for name, _ in contents(tmp_path / "first")}
    assert {"engine.plan", "run.pyz", "report/verify.md", "manifest.json"} <= names


def contents(bundle: Path) -> Files:
    """Every file of a directory by its path inside it."""
    files = (path for path in bundle.rglob("*") if path.is_file())
    return frozenset((path.relative_to(bundle).as_posix(), path.read_bytes()) for path in files)


def test_an_engine_may_be_built_for_some_gpus_only(tmp_path: Path) -> None:
    write_graph(tmp_path)
    plan = compile_graph(tmp_path, options=EngineOptions(gpus=("sm89", "SM120")))
    assert plan.nbytes > 2 * SPEC.num_parameters
    with pytest.raises(UsageError, match=r"sm90.*builds for.*sm89"):
        compile_graph(tmp_path, options=EngineOptions(gpus=("sm90",)))


def test_nested_phases_make_one_share_that_grows_to_one() -> None:
    phases = Phases()
    phases.start("build", 4)
    phases.step("build", 2)
    phases.start("time", 10)
    phases.step("time", 5)
    assert phases.share == (2 + 5 / 10) / 4
    phases.finish("time")
    phases.step("build", 4)
    assert phases.share == 1.0


def test_progress_counts_up_to_the_work_that_was_announced(
    tmp_path: Path, checkpoint: Path
) -> None:
    totals, counts = [], []

    @contextmanager
    def stage(title: str, total: int | None = None) -> Iterator[Any]:
        wanted = title == "Building the engine"
        if wanted:
            totals.append(total)
        yield counts.append if wanted else lambda _count: None

    export(str(checkpoint), tmp_path / "bundle", ExportOptions(target="rtx"), stage)
    assert totals == [sum(counts)]
    assert min(counts) > 0


def test_profiles_cover_every_step_that_the_host_takes() -> None:
    ((least, best, most),) = profiles(RING, apart=False)
    assert least == best == {"B": 1, "S": 1, "T": 1}
    assert most == {"B": 1, "S": RING.chunk, "T": RING.chunk}
    decode, prompt = profiles(RING, apart=True)
    assert decode[2] == {"B": 2, "S": 1, "T": 1}, "two rows: see `profiles`"
    assert prompt[1]["S"] == prompt[2]["S"] == RING.chunk
    assert profiles(replace(RING, max_batch=5), apart=True)[1][2]["B"] == 5


def test_a_graph_that_tensorrt_refuses_is_one_clear_error(tmp_path: Path) -> None:
    model = write_graph(tmp_path)
    scatter = next(node for node in model.graph if node.op_type == "TensorScatter")
    scatter.attributes["mode"] = ir.AttrString("mode", "circular")
    ir.save(model, tmp_path / "model.onnx")
    with pytest.raises(MistralcError, match="TensorRT could not") as raised:
        compile_graph(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("precision", "bits"), [("int8wo", 8), ("int4wo", 4 + 16 / 128), ("int8", 8), ("fp8", 8)]
)
def test_every_quantized_precision_compiles_and_its_plan_holds_the_codes(
    precision: str, bits: float, checkpoint: Path, tmp_path: Path
) -> None:
    table = None
    linears = [name for group in groups(SPEC) for name in group.readers]
    if precision in ("int8", "fp8"):
        table = tmp_path / "table"
        table.mkdir()
        CalibrationTable(
            precision=precision, method="by hand",
            checkpoint=open_checkpoint(checkpoint).fingerprint(), data={}, versions={},
            schemes=dict.fromkeys(linears, default_scheme(precision, block=None)),
            tensors={f"{group.name}.input_scale": torch.tensor(0.05) for group in groups(SPEC)},
        ).write(table)  # fmt: skip
    options = ExportOptions(target="rtx", precision=precision, calibration=table)

    def build(name: str) -> Files:
        export(str(checkpoint), tmp_path / name, replace(options, force=True))
        return contents(tmp_path / name)

    assert reproduced([partial(build, "bundle"), partial(build, "again")])
    facts = read_manifest(tmp_path / "bundle").engine
    assert facts is not None
    assert facts["faults"] == []
    assert facts["attention_fused"] == SPEC.num_hidden_layers
    shapes = SPEC.weight_shapes()
    codes = sum(shapes[name][0] * shapes[name][1] for name in linears)
    head = shapes["lm_head.weight"][0] * shapes["lm_head.weight"][1]
    kept = 2 * (SPEC.num_parameters - codes - head)  # bytes
    head_bytes = head if precision.endswith("wo") else 2 * head
    expected = codes * bits / 8 + kept + head_bytes
    # Scales of rows, kernels and tables: 6.7 MB.
    assert expected < facts["plan_bytes"] < expected + 7_000_000
    embedding = SPEC.vocab_size * SPEC.hidden_size * 2
    assert facts["decode"]["weights"] == pytest.approx(expected - embedding, rel=0.01)


def test_a_faulty_engine_leaves_nothing_behind(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = auditing.audit
    monkeypatch.setattr(
        exporting.audit, "audit", lambda *args: replace(real(*args), attention_fused=0)
    )
    options = ExportOptions(target="rtx", precision="fp16")
    with pytest.raises(MistralcError, match="not fit to ship"):
        export(str(checkpoint), tmp_path / "bundle", options)
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_it_built_and_inspect_shows_the_audit(
    mistralc: Command, checkpoint: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    ended = mistralc("export", checkpoint, "-o", bundle, "--target", "rtx")
    assert ended.code == 0, ended.err
    assert "rtx, bf16" in ended.out, "a bfloat16 checkpoint keeps its type"
    shown = json.loads(mistralc("inspect", bundle, "--json").out)
    assert shown["manifest"]["engine"]["faults"] == []
    assert "fused attention" in (bundle / "report" / "verify.md").read_text(encoding="utf-8")
    assert "2 of 2 attention layers fused" in mistralc("inspect", bundle).out
    refused = mistralc("verify", bundle)
    assert refused.code == 1
    assert "--against" in refused.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--target", "rtx", "--precision", "fp32"), "fp16, bf16"),
        (("--target", "cpu", "--weight-streaming"), "which builds none"),
        (("--target", "rtx", "--chunk", "8"), "at least 64"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_built(
    mistralc: Command, checkpoint: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    ended = mistralc("export", checkpoint, "-o", tmp_path / "bundle", *arguments)
    assert ended.code == 2
    assert words in ended.err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_tensorrt_is_reported_before_the_checkpoint_is_read(
    mistralc: Command, tmp_path: Path
) -> None:
    ended = mistralc("export", tmp_path / "nowhere", "--target", "tensorrt")
    assert ended.code == 1
    assert "pip install 'mistralc[tensorrt]'" in ended.err


@pytest.mark.parametrize("command", [("inspect", "model"), ("run", "--onnxrt")])
def test_polygraphy_accepts_the_portable_graph(command: tuple[str, ...], tmp_path: Path) -> None:
    model = tiny.fill(tiny.lowered(SPEC, "portable"), SPEC)
    ir.save(model, tmp_path / "model.onnx")
    sizes = {"B": 1, "S": 2, "T": 1, "C": 128}
    shapes = [
        f"{value.name}:[{','.join(str(sizes.get(str(d), d)) for d in value.shape or ())}]"
        for value in model.graph.inputs
    ]
    arguments = ["--input-shapes", *shapes, "--val-range", "[0,1]"] if command[0] == "run" else []
    polygraphy = Path(sys.executable).with_name("polygraphy")
    ended = subprocess.run(
        [polygraphy, *command, tmp_path / "model.onnx", *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "present_value.1" in ended.stdout
