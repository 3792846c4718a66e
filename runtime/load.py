"""From a checked bundle to something that generates: session, ring, tokenizer. Knows no command.

The backend is imported here, when it is needed, and nowhere else.
"""

from pathlib import Path

from graphs.errors import MistralcError
from graphs.manifest import Manifest
from runtime.bundle import Bundle
from runtime.generator import Generator
from runtime.ring import Ring
from runtime.session import Session


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


def load_generator(bundle: Bundle, *, threads: int | None = None) -> Generator:
    """Load a bundle for one sequence."""
    manifest = bundle.manifest
    session = load_session(bundle.path, manifest, threads=threads)
    ring = Ring(manifest.model, manifest.ring)
    return Generator(session, ring, manifest.model.vocab_size)
