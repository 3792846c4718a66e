"""From a checked bundle to something that generates: session, ring, tokenizer. Knows no command.

The backend is imported here, when it is needed, and nowhere else.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from graphs.errors import MistralcError
from graphs.manifest import Manifest
from runtime.bundle import Bundle, open_bundle
from runtime.generator import Generator
from runtime.progress import Stage, silent
from runtime.ring import Ring
from runtime.session import Session
from runtime.tokenizer import Tokenizer


def load_session(
    directory: Path, manifest: Manifest, *, batch: int = 1, threads: int | None = None
) -> Session:
    """Load the graph in `directory` on the backend that the manifest's target names."""
    if manifest.target != "cpu":
        raise MistralcError(
            f"{directory} was built for the target {manifest.target!r}, which this version of "
            "mistralc cannot run. Install the version that wrote it, or export it for cpu."
        )
    try:
        from runtime.session_ort import OrtSession
    except ModuleNotFoundError as error:
        raise MistralcError(
            "This bundle runs on ONNX Runtime, which is not installed. Install it: "
            "pip install 'mistralc[cpu]'."
        ) from error
    return OrtSession(directory / "model.onnx", manifest.model, batch=batch, threads=threads)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A bundle ready to generate. `defaults` is the checkpoint's `generation_config`."""

    bundle: Bundle
    generator: Generator
    tokenizer: Tokenizer
    defaults: dict[str, Any]
    seconds: float  # it took to check and load


def load(path: Path, *, threads: int | None = None, stage: Stage = silent) -> Loaded:
    """Check the bundle at `path` and load it for one sequence."""
    began = perf_counter()
    with stage("Checking the bundle", None):
        bundle = open_bundle(path)
    manifest = bundle.manifest
    with stage("Loading the model", None):
        tokenizer = Tokenizer.load(path)
        session = load_session(path, manifest, threads=threads)
        ring = Ring(manifest.model, manifest.ring)
        generator = Generator(session, ring, manifest.model.vocab_size)
    return Loaded(
        bundle=bundle,
        generator=generator,
        tokenizer=tokenizer,
        defaults=json.loads((path / "generation_config.json").read_text(encoding="utf-8")),
        seconds=perf_counter() - began,
    )
