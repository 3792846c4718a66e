"""The way from a checkpoint to a bundle, in the order it happens. Knows no command line.

Read, trace, lower, write, verify, publish. Nothing appears at the destination before the last
step, and nothing is traced before the cheap refusals: bad options, no space, a bad tokenizer.
"""

import platform
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from exporter import bundle
from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.config import override_window
from exporter.model import load_decoder
from exporter.tokenizer import read_tokenizer
from exporter.trace import trace
from exporter.verify import Agreement, cases, require, to_json, to_markdown, verify
from exporter.weights import total_bytes, write_weights
from graphs.errors import UsageError
from graphs.manifest import Manifest
from graphs.pipeline import lower
from graphs.spec import ITEM_SIZE, Dtype, ModelSpec, RingSpec
from runtime.load import load_session
from runtime.progress import Stage, silent

ACTIVATION: dict[str, dict[str, Dtype]] = {"cpu": {"fp32": "float32"}}
"""By target and precision: what the graph computes in. A pair that is not here is not built."""

LARGEST_CHUNK, LARGEST_CONTEXT = 512, 4096  # defaults; tokens
TOOLS = ("mistralc", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "tokenizers")
SPARE = 64 << 20  # bytes beside the weights: graph, tokenizer, report


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What the user may choose. None leaves the choice to the checkpoint."""

    target: str = "cpu"
    precision: str = "fp32"
    window: int | None = None
    context: int | None = None
    chunk: int | None = None
    max_batch: int = 1
    force: bool = False

    def __post_init__(self) -> None:
        if self.target not in ACTIVATION:
            raise UsageError(
                f"--target is {self.target!r}; this version builds {' and '.join(ACTIVATION)}."
            )
        if self.precision not in ACTIVATION[self.target]:
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


def export(
    source: str, destination: Path, options: ExportOptions, stage: Stage = silent
) -> Manifest:
    """Export the checkpoint `source` to a bundle at `destination`; returns its manifest.

    Raises MistralcError, and leaves nothing behind, when anything is not as it must be: the
    options, the checkpoint, the space on disk, or the numbers of the finished bundle.
    """
    bundle.check_destination(destination, force=options.force)
    checkpoint = open_checkpoint(source)
    spec = _windowed(checkpoint.spec, options)
    ring = ring_spec(spec, options)
    activation = ACTIVATION[options.target][options.precision]
    tokenizer = read_tokenizer(checkpoint.path)
    bundle.check_space(destination, spec.num_parameters * ITEM_SIZE[activation] + SPARE)
    with stage("Tracing the decoder", None):
        model = trace(spec, activation)
        passes = lower(model, spec, options.target)
    with stage("Hashing the checkpoint", None):
        fingerprint = checkpoint.fingerprint()
    with bundle.staged(destination) as directory:
        with stage("Writing weights", total_bytes(model)) as advance:
            write_weights(model, checkpoint, directory, advance)
        bundle.write_model(model, directory)
        bundle.write_tokenizer(tokenizer, directory)
        manifest = Manifest(
            target=options.target,
            precision=options.precision,
            activation=activation,
            model=spec,
            ring=ring,
            window_source="checkpoint" if options.window is None else "user",
            checkpoint={
                "name": Path(checkpoint.source).name,
                "format": checkpoint.format,
                "fingerprint": fingerprint,
            },
            versions=versions(),
            passes=passes,
            files={},
        )
        agreements = _check(directory, manifest, checkpoint, stage)
        with stage("Hashing the bundle", None):
            manifest = replace(manifest, files=bundle.list_files(directory))
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
    chunk = options.chunk or min(LARGEST_CHUNK, smallest)
    return RingSpec(chunk=chunk, context=context, max_batch=options.max_batch)


def record(
    manifest: Manifest, directory: Path, agreements: list[Agreement], against: str
) -> Manifest:
    """Write the verification into the bundle's `report/` and manifest, which is returned."""
    result = to_json(agreements, against)
    return bundle.write_record(
        replace(manifest, verification=result), to_markdown(result), directory
    )


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


def _check(
    directory: Path, manifest: Manifest, checkpoint: Checkpoint, stage: Stage
) -> list[Agreement]:
    """Verify the finished files before anyone can see them."""
    tokens = sum(case.tokens for case in cases(manifest, short=True))
    with stage("Verifying", tokens) as advance:
        reference = load_decoder(manifest.model, checkpoint.tensor)
        session = load_session(directory, manifest)
        agreements = verify(session, manifest, reference, short=True, progress=advance)
    require(agreements)
    return agreements
