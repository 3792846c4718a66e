"""The way from a checkpoint to a bundle, in the order it happens. Knows no command line.

Read, trace, lower, write, compile, verify, publish. Nothing appears at the destination before the
last step, and nothing is begun before the cheap refusals: bad options, a host without the memory
or the space, a bad tokenizer.
"""

import platform
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Event
from typing import Any

import onnx_ir as ir

from exporter.bundle import staging
from exporter.bundle.run_archive import write_run_archive
from exporter.bundle.weights_file import Layout, link_weights, stream_weights
from exporter.checkpoint.config_hf import override_window
from exporter.checkpoint.open import Checkpoint, open_checkpoint
from exporter.checks.golden import golden, margin
from exporter.checks.quality_gate import Gate, measure
from exporter.checks.verify import Agreement, cases, require, to_json, to_markdown, verify
from exporter.decoder.model import Decoder
from exporter.decoder.trace import trace
from exporter.engine import audit
from exporter.engine.process import build_engine
from exporter.engine.request import BuildRequest, EngineOptions, capacities
from exporter.estimate import plan, require_host
from exporter.quantization.calibration_table import CalibrationTable
from exporter.quantization.make_recipe import describe, make_recipe, quantization
from exporter.quantization.policy import QuantizeOptions
from exporter.quantization.recipe import Recipe
from exporter.quantization.reference import simulate
from exporter.tokenizer.read import read_tokenizer
from graphs.errors import UsageError
from graphs.manifest import Manifest
from graphs.passes.fix_dimensions import specialize
from graphs.passes.pipeline import BATCH_INVARIANT, lower
from graphs.quant_scheme import QUANTIZED
from graphs.spec import Dtype, ModelSpec, RingSpec
from runtime.backends import tensorrt_library
from runtime.backends.session import Session
from runtime.decoding.golden import require_invariance
from runtime.load import load_session, make_ring
from runtime.system.progress import Stage, silent

HALF: Mapping[str, Dtype] = {"fp16": "float16", "bf16": "bfloat16"}
ENGINE: Mapping[str, Dtype] = {**HALF, **dict.fromkeys(QUANTIZED, "float16")}
ACTIVATION: Mapping[str, Mapping[str, Dtype]] = {
    "cpu": {"fp32": "float32", **dict.fromkeys(QUANTIZED, "float32")},
    "cuda": HALF,
    "rtx": ENGINE,
    "tensorrt": ENGINE,
}
"""By target and precision: what the graph computes in. A pair that is not here is not built."""

ENGINES = ("rtx", "tensorrt")
LARGEST_CHUNK, LARGEST_CONTEXT = 512, 4096  # defaults; tokens
LARGEST_CPU_CHUNK = 256  # reads a prompt of 512 tokens 5 to 10% faster than one chunk of 512 does
ENGINE_CHUNK = 64  # tokens; of fewer it makes a duplicate "iota", or finds no attention kernel
TOOLS = ("mistralc", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu",
         "tensorrt", "tensorrt-rtx-cu13", "tokenizers")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What the user may choose. None leaves the choice to the checkpoint and the target."""

    target: str = "cpu"
    precision: str | None = None
    window: int | None = None
    context: int | None = None
    chunk: int | None = None
    max_batch: int = 1
    force: bool = False
    engine: EngineOptions = field(default_factory=EngineOptions)
    allow_faults: bool = False
    quantize: QuantizeOptions = field(default_factory=QuantizeOptions)
    calibration: Path | None = None
    gate: Gate = field(default_factory=Gate)
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        if self.target not in ACTIVATION:
            raise UsageError(
                f"--target is {self.target!r}; one of {', '.join(ACTIVATION)} is expected."
            )
        if self.precision is not None and self.precision not in ACTIVATION[self.target]:
            known = ", ".join(ACTIVATION[self.target])
            raise UsageError(
                f"--precision is {self.precision!r}; the target {self.target} is built in {known}."
            )
        for name in ("window", "context", "chunk", "max_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                option = "--" + name.replace("_", "-")
                raise UsageError(f"{option} is {value}; a whole number from 1 up is expected.")
        if self.window is not None and self.context is not None:
            raise UsageError(
                "--window and --context exclude each other: a model that slides everywhere has no "
                "end of context. Give one of them."
            )
        if self.target not in ENGINES and self.engine != EngineOptions():
            raise UsageError(
                f"Options of an engine were given for --target {self.target}, which has none. "
                "Leave them out, or choose --target rtx or tensorrt."
            )
        if self.batch_invariant and self.target not in BATCH_INVARIANT:
            raise UsageError(
                f"--batch-invariant was given for --target {self.target}; it is made for "
                f"{', '.join(BATCH_INVARIANT)} only. Leave it out, or choose that target."
            )

    @property
    def precision_or_default(self) -> str:
        """What to call the result before the checkpoint has been looked at."""
        return self.precision or ("fp32" if self.target == "cpu" else "half")


def export(
    source: str, destination: Path, options: ExportOptions, stage: Stage = silent
) -> Manifest:
    """Export the checkpoint `source` to a bundle at `destination`; returns its manifest.

    Raises MistralcError, and leaves nothing behind, when anything is not as it must be: the
    options, the checkpoint, the host, or the numbers of the finished bundle.
    """
    staging.check_destination(destination, force=options.force)
    if options.target in ENGINES:
        tensorrt_library.load(options.target)
    checkpoint = open_checkpoint(source)
    spec = _windowed(checkpoint.spec, options)
    ring = ring_spec(spec, options)
    precision = options.precision or _default_precision(options.target, checkpoint)
    table = None if options.calibration is None else _read_table(options.calibration, checkpoint)
    activation = ACTIVATION[options.target][precision]
    recipe = make_recipe(
        checkpoint, spec, options.target, precision, activation, options.quantize, table
    )
    tokenizer = read_tokenizer(checkpoint.path)
    require_host(plan(spec, ring, options.target, precision), destination)
    manifest = Manifest(
        target=options.target,
        precision=precision,
        activation=activation,
        model=spec,
        ring=ring,
        window_source="checkpoint" if options.window is None else "user",
        checkpoint={"name": Path(checkpoint.source).name, "format": checkpoint.format},
        quantization=describe(recipe, table),
        versions=versions(),
        files={},
    )
    with staging.staged(destination) as directory:
        graph = directory / "graph" if options.target in ENGINES else directory
        graph.mkdir(exist_ok=True)
        model, manifest = _write_graph(
            checkpoint, recipe, manifest, graph, stage, batch_invariant=options.batch_invariant
        )
        staging.write_tokenizer(tokenizer, directory)
        write_run_archive(directory)
        reference = simulate(recipe, checkpoint.tensor)
        with stage("Asking the reference for golden tokens", None):
            lead = margin(activation, rounded=recipe.rounds_inputs)
            texts = golden(reference, tokenizer.open().encode, lead)
        manifest = replace(manifest, golden=texts)
        if options.target in ENGINES:
            manifest = _compile(model, recipe, manifest, options, directory, stage)
        agreements = None
        if options.target == "cpu":  # the others need a GPU: `mistralc verify` and `eval` there
            session = load_session(directory, manifest)
            agreements = _check(session, manifest, reference, stage)
            if manifest.quantization is not None:
                quality = measure(
                    options.gate, session, manifest, checkpoint, tokenizer.open(), stage
                )
                facts = {**manifest.quantization, "quality": quality}
                manifest = replace(manifest, quantization=facts)
        with stage("Hashing the bundle", None):
            known = (
                {} if manifest.engine is None else {"engine.plan": manifest.engine["plan_sha256"]}
            )
            manifest = replace(manifest, files=staging.list_files(directory, known))
        return record(manifest, directory, agreements, "the checkpoint")


def ring_spec(spec: ModelSpec, options: ExportOptions) -> RingSpec:
    """Choose the ring: small windows get small chunks, lest the ring be mostly slack."""
    context = options.context or min(spec.max_position_embeddings, LARGEST_CONTEXT)
    if options.context is not None and spec.slides:
        raise UsageError(
            f"--context is {options.context}, but every layer of this checkpoint slides (window "
            f"{spec.windows[0]}), so text has no end. Leave it out."
        )
    if context > spec.max_position_embeddings:
        raise UsageError(
            f"--context is {context}; the checkpoint was made for {spec.max_position_embeddings} "
            "positions. Give at most that, or --window to let the text slide."
        )
    smallest = min((size for size in spec.windows if size is not None), default=context)
    least = ENGINE_CHUNK if options.target in ENGINES else 1
    largest = LARGEST_CPU_CHUNK if options.target == "cpu" else LARGEST_CHUNK
    chunk = options.chunk or max(least, min(largest, smallest))
    if chunk < least:
        raise UsageError(
            f"--chunk is {chunk}; an engine needs at least {least}: TensorRT-RTX 1.7 fails to "
            "compile shorter steps. Leave it out, or give a larger one."
        )
    return RingSpec(chunk=chunk, context=context, max_batch=options.max_batch)


def record(
    manifest: Manifest, directory: Path, agreements: list[Agreement] | None, against: str
) -> Manifest:
    """Write what is known of the bundle into its `report/` and manifest, which is returned."""
    if agreements is not None:
        manifest = replace(manifest, verification=to_json(agreements, against))
    parts = []
    if manifest.verification is not None:
        parts.append(to_markdown(manifest.verification))
    if manifest.engine is not None:
        parts.append(audit.to_markdown(manifest.engine))
    return staging.write_record(manifest, "\n".join(parts), directory)


def versions() -> dict[str, str]:
    """Versions of what made the bundle, by distribution name."""
    found = {"python": platform.python_version()}
    for name in TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _windowed(spec: ModelSpec, options: ExportOptions) -> ModelSpec:
    return spec if options.window is None else override_window(spec, options.window)


def _default_precision(target: str, checkpoint: Checkpoint) -> str:
    """Take the checkpoint's own bfloat16 where that is a choice: no bit is lost in it."""
    known = list(ACTIVATION[target])
    stored = set(checkpoint.dtypes.values())
    return "bf16" if stored == {"bfloat16"} and "bf16" in known else known[0]


def _read_table(path: Path, checkpoint: Checkpoint) -> CalibrationTable:
    table = CalibrationTable.read(path)
    table.require(checkpoint.fingerprint(), checkpoint.source)
    return table


def _write_graph(
    checkpoint: Checkpoint, recipe: Recipe, manifest: Manifest, directory: Path, stage: Stage,
    *, batch_invariant: bool,
) -> tuple[ir.Model, Manifest]:  # fmt: skip
    """Write `model.onnx` and `weights.safetensors`, tracing the one while the other is streamed."""
    spec, activation = manifest.model, manifest.activation
    stopped = Event()
    total = Layout.of(recipe).nbytes
    with stage("Tracing the decoder and writing weights", total) as advance:

        def step(count: int) -> None:
            if stopped.is_set():
                raise InterruptedError("the tracer failed, or was interrupted")
            advance(count)

        def stream() -> str:
            return stream_weights(checkpoint, recipe, directory, step)

        with ThreadPoolExecutor(1) as pool:
            fingerprint = pool.submit(stream)
            try:
                model = trace(spec, activation)
                if manifest.target in ENGINES:
                    specialize(model, capacities(spec, manifest.ring))
                passes = lower(
                    model, spec, manifest.target, quantization(recipe), activation,
                    manifest.ring.context, batch_invariant=batch_invariant,
                )  # fmt: skip
            except BaseException:
                stopped.set()
                raise
            named = {**manifest.checkpoint, "fingerprint": fingerprint.result()}
    link_weights(model, recipe, directory)
    staging.write_model(model, directory)
    return model, replace(manifest, checkpoint=named, passes=passes)


def _compile(
    model: ir.Model,
    recipe: Recipe,
    manifest: Manifest,
    options: ExportOptions,
    directory: Path,
    stage: Stage,
) -> Manifest:
    """Turn the graph in `directory`/graph into `engine.plan`, audit it, and drop the graph."""
    spec, ring, activation = manifest.model, manifest.ring, manifest.activation
    request = BuildRequest(
        graph=directory / "graph" / "model.onnx", plan=directory / "engine.plan", spec=spec,
        ring=ring, activation=activation, target=options.target, options=options.engine,
    )  # fmt: skip
    with stage("Building the engine", request.work) as advance:
        built = build_engine(request, advance)
    weights = Layout.of(recipe).weight_bytes
    found = audit.audit(built, model.graph, spec, ring, activation, weights)
    audit.require(found, allow=options.allow_faults)
    shutil.rmtree(directory / "graph")
    facts: dict[str, Any] = {**found.to_json(), "gpus": list(options.engine.gpus)}
    return replace(manifest, engine=facts)


def _check(
    session: Session, manifest: Manifest, reference: Decoder, stage: Stage
) -> list[Agreement]:
    """Verify the finished files before anyone can see them."""
    tokens = sum(case.tokens for case in cases(manifest, short=True))
    with stage("Verifying", tokens) as advance:
        agreements = verify(session, manifest, reference, short=True, progress=advance)
    require(agreements)
    if manifest.batch_invariant:
        require_invariance(session, make_ring(manifest), manifest.golden)
    return agreements
