"""From a checkpoint to a bundle, in the order in which it happens. Knows no command line.

Decide, trace, lower, write, compile, verify, publish. Nothing appears at the destination before the
last step, and nothing starts before the cheap refusals: wrong options, a host without the memory or
the space, a tokenizer that cannot be carried over.
"""

import platform
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Event
from typing import Any

import onnx_ir as ir

from exporter.bundle import staging
from exporter.bundle.run_archive import write_run_archive
from exporter.bundle.weights_file import WeightsLayout, link_weights, stream_weights
from exporter.checkpoint.open import Checkpoint, open_checkpoint
from exporter.checkpoint.read_ahead import ReadAhead
from exporter.checks import quality_gate
from exporter.checks.reference_pass import Answers, ask
from exporter.checks.text_agreement import text_record
from exporter.checks.texts import cases, cases_left_out
from exporter.checks.verify import Agreement, compare, require, to_json, to_markdown
from exporter.decide import decide, decide_precision
from exporter.decoder.trace import trace
from exporter.engine import audit
from exporter.engine.process import build_engine
from exporter.engine.request import BuildRequest, profiles
from exporter.estimate import host
from exporter.estimate.refusal import require_host
from exporter.options import ExportOptions
from exporter.quantization.calibration_table import CalibrationTable
from exporter.quantization.carry import describe_carried, own_precision
from exporter.quantization.make_recipe import (
    check_calibration,
    describe,
    make_recipe,
    quantization,
    weight_facts,
)
from exporter.quantization.policy import WeightFacts
from exporter.quantization.recipe import Recipe
from exporter.quantization.reference import simulate
from exporter.tokenizer.read import TokenizerFiles, read_tokenizer
from graphs.build import Build
from graphs.manifest import Manifest
from graphs.passes.pipeline import lower
from graphs.targets import TARGETS, backend_distributions
from runtime.backends import tensorrt_library
from runtime.decoding.golden import require_invariance
from runtime.load import load_session, make_ring
from runtime.system.progress import Stage, silent

TOOLS = ("mistralc", "torch", "onnx", "onnx-ir", "onnxscript", "tokenizers")
"""Distributions whose versions a manifest records, beside those of the backends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What an export starts from: everything that was read, checked and decided."""

    checkpoint: Checkpoint
    table: CalibrationTable | None
    tokenizer: TokenizerFiles
    facts: WeightFacts
    build: Build
    recipe: Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """A written graph: the model, the fingerprint of the weights, and how often each pass fired."""

    model: ir.Model
    fingerprint: str
    passes: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checks:
    """What the finished files were found to compute; None: not measured on this host."""

    agreements: list[Agreement] | None = None
    quality: dict[str, Any] | None = None


def export(
    source: str, destination: Path, options: ExportOptions, stage: Stage = silent
) -> Manifest:
    """Export the checkpoint `source` to a bundle at `destination`; returns its manifest.

    Raises MistralcError, and leaves nothing behind, if any check fails: of the options, the
    checkpoint, the host, or the numbers of the finished bundle.
    """
    staging.check_destination(destination, force=options.force)
    opened = _open(source, options)
    build = opened.build
    require_host(build, destination, options, opened.facts)
    with stage("Comparing the tokenizer", None):
        text = text_record(opened.checkpoint.text, opened.tokenizer, build.spec.vocab_size)
    with staging.staged(destination) as directory:
        graph_folder = directory / "graph" if build.target.holds_plan else directory
        graph_folder.mkdir(exist_ok=True)
        graph = _write_graph(opened, graph_folder, stage)
        staging.write_tokenizer(opened.tokenizer, directory)
        write_run_archive(directory)
        answers = _ask_reference(opened, stage)
        engine, checks = None, Checks()
        if build.target.holds_plan:
            engine = _compile(graph.model, opened, options, directory, stage)
        if build.target.verified_at_export:
            checks = _check(opened, options, directory, answers, stage)
        with stage(host.HASH, None):
            known = {} if engine is None else {"engine.plan": engine["plan_sha256"]}
            files = staging.list_files(directory, known)
        manifest = Manifest(
            target=build.target.name,
            precision=build.precision.name,
            activation=build.activation,
            model=build.spec,
            ring=build.ring,
            window_source=build.window_source,
            checkpoint=_origin(opened, graph.fingerprint),
            versions=versions(),
            passes=graph.passes,
            quantization=describe(opened.recipe, opened.table, checks.quality),
            golden=answers.golden,
            verification=(
                None
                if checks.agreements is None
                else to_json(checks.agreements, "the checkpoint", cases_left_out(build))
            ),
            text=text,
            engine=engine,
            files=files,
        )
        return record(manifest, directory)


def record(manifest: Manifest, directory: Path) -> Manifest:
    """Write the manifest and, from it, `report/verify.md`; returns the manifest that lists it."""
    parts = []
    if manifest.verification is not None:
        parts.append(to_markdown(manifest.verification))
    quality = (manifest.quantization or {}).get("quality")
    if quality is not None:
        parts.append(quality_gate.to_markdown(quality))
    if manifest.engine is not None:
        parts.append(audit.to_markdown(manifest.engine))
    return staging.write_record(manifest, "\n".join(parts), directory)


def versions() -> dict[str, str]:
    """Versions of what made the bundle, by distribution name."""
    found = {"python": platform.python_version()}
    for name in (*TOOLS, *backend_distributions()):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _origin(source: Source, fingerprint: str) -> dict[str, str]:
    """Say which checkpoint a bundle is made of, and what became of the codes that it stores."""
    checkpoint = source.checkpoint
    facts = {"name": Path(checkpoint.source).name, "format": checkpoint.format,
             "fingerprint": fingerprint}  # fmt: skip
    carried = describe_carried(source.build, source.facts.codes)
    if carried:
        facts["codes"] = "\n".join(carried)
    if checkpoint.left_out:  # such as a vision tower
        facts["left_out"] = ", ".join(checkpoint.left_out)
    if checkpoint.adapters:
        facts["adapters"] = ", ".join(one.label for one in checkpoint.adapters)
    return facts


def _open(source: str, options: ExportOptions) -> Source:
    """Read and decide everything that needs no weight, so that refusals come first."""
    target = TARGETS[options.target]
    if target.holds_plan:
        tensorrt_library.load(target)
    checkpoint = open_checkpoint(source, options.adapters.lora)
    table = None if options.calibration is None else _read_table(options.calibration, checkpoint)
    facts = weight_facts(checkpoint, table)
    precision = decide_precision(checkpoint.spec, target, options, facts)
    own = own_precision(checkpoint.spec, target, facts.codes)
    check_calibration(precision, options.quantize, checkpoint.spec, table, own)
    build = decide(checkpoint.spec, target, options, facts)
    return Source(
        checkpoint=checkpoint, table=table,
        tokenizer=read_tokenizer(checkpoint.text, checkpoint.path),
        facts=facts, build=build, recipe=make_recipe(build, checkpoint, table),
    )  # fmt: skip


def _read_table(path: Path, checkpoint: Checkpoint) -> CalibrationTable:
    table = CalibrationTable.read(path)
    table.require(checkpoint.fingerprint(), checkpoint.source)
    return table


def _write_graph(source: Source, directory: Path, stage: Stage) -> Graph:
    """Write `model.onnx` and `weights.safetensors`; tracing runs while weights are streamed."""
    build, recipe = source.build, source.recipe
    stopped = Event()
    with stage(host.TRACE, WeightsLayout.of(recipe).nbytes) as advance:

        def step(count: int) -> None:
            if stopped.is_set():
                raise InterruptedError("the tracer failed, or was interrupted")
            advance(count)

        def stream() -> str:
            return stream_weights(source.checkpoint, recipe, directory, step)

        with ThreadPoolExecutor(1) as pool:
            fingerprint = pool.submit(stream)
            try:
                model = trace(build.spec, build.activation)
                passes = lower(model, build, quantization(recipe))
            except BaseException:
                stopped.set()
                raise
            written = fingerprint.result()
    link_weights(model, recipe, directory)
    staging.write_model(model, directory)
    return Graph(model=model, fingerprint=written, passes=passes)


def _compile(
    model: ir.Model, source: Source, options: ExportOptions, directory: Path, stage: Stage
) -> dict[str, Any]:
    """Compile `directory`/graph into `engine.plan`, audit it, remove the graph; the audit's facts.

    Raises MistralcError if the engine has a fault that the user did not allow.
    """
    build = source.build
    request = BuildRequest(
        graph=directory / "graph" / "model.onnx", plan=directory / "engine.plan",
        contract=build.contract, target=build.target.name, options=options.engine,
        profiles=profiles(build.ring, apart=build.decodes_apart),
    )  # fmt: skip
    with stage(host.COMPILE, request.work) as advance:
        built = build_engine(request, advance)
    weights = WeightsLayout.of(source.recipe).weight_bytes
    found = audit.audit(built, model.graph, build, weights)
    audit.require(found, allow=options.allow_faults)
    shutil.rmtree(directory / "graph")
    return {**found.to_json(), "gpus": list(options.engine.gpus)}


def _ask_reference(source: Source, stage: Stage) -> Answers:
    """Run the PyTorch decoder on all texts that the bundle will be compared on."""
    build = source.build
    reference = simulate(source.recipe, ReadAhead(source.checkpoint))
    chosen = cases(build, short=True) if build.target.verified_at_export else []
    with stage(host.REFERENCE, None):
        return ask(reference, build, chosen, source.tokenizer.open().encode)


def _check(
    source: Source, options: ExportOptions, directory: Path, answers: Answers, stage: Stage
) -> Checks:
    """Verify the finished files, and measure what quantizing cost, before anyone can see them."""
    build = source.build
    with stage(host.LOAD, None):
        session = load_session(directory, build)
    chosen = cases(build, short=True)
    with stage(host.VERIFY, sum(case.tokens for case in chosen)) as advance:
        agreements = compare(session, build, chosen, answers.logits, advance)
    require(agreements)
    if build.batch_invariant:
        require_invariance(session, make_ring(build), answers.golden)
    if not build.precision.quantized:
        return Checks(agreements=agreements)
    tokenizer = source.tokenizer.open()
    quality = quality_gate.measure(
        options.gate, session, build, source.checkpoint, tokenizer, stage
    )
    return Checks(agreements=agreements, quality=quality)
