"""Load a checked bundle: session, ring and tokenizer. Knows nothing about commands.

Backends are imported here and nowhere else, and only when they are needed.
"""

import importlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from types import MappingProxyType
from typing import Any

from graphs.build import Build
from graphs.errors import MistralcError
from graphs.manifest import FileEntry
from graphs.targets import Target, require_entry_per_target
from runtime.backends.session import Session
from runtime.bundle.open import Bundle, open_bundle
from runtime.decoding.generator import Generator
from runtime.decoding.golden import replay, require_invariance
from runtime.decoding.ring import Ring
from runtime.system.progress import Stage, silent
from runtime.text.tokenizer import Tokenizer

Files = Mapping[str, FileEntry]
NO_FILES: Files = MappingProxyType({})


def _open_cpu(
    directory: Path, build: Build, files: Files, batch: int, threads: int | None
) -> Session:
    from runtime.backends.onnxruntime_cpu import open_session

    return open_session(
        directory / "model.onnx", build, sum(entry.size for entry in files.values()),
        batch=batch, threads=threads,
    )  # fmt: skip


def _open_cuda(
    directory: Path, build: Build, _files: Files, batch: int, _threads: int | None
) -> Session:
    from runtime.backends.onnxruntime_cuda import CudaOrtSession

    return CudaOrtSession(directory / "model.onnx", build.contract, build.target, batch=batch)


def _open_tensorrt(
    directory: Path, build: Build, files: Files, batch: int, _threads: int | None
) -> Session:
    from runtime.backends import kernel_cache
    from runtime.backends.tensorrt import TrtSession

    entry = files.get("engine.plan")
    cache = None if entry is None else kernel_cache.kernels_file(entry.sha256)
    return TrtSession(
        directory / "engine.plan", build.contract, build.target,
        batch=batch, cache=cache,
    )  # fmt: skip


SESSIONS: Mapping[str, Callable[[Path, Build, Files, int, int | None], Session]] = {
    "cpu": _open_cpu,
    "cuda": _open_cuda,
    "rtx": _open_tensorrt,
    "tensorrt": _open_tensorrt,
}
"""By target: what opens a bundle's directory. See `load_session` for the arguments."""

require_entry_per_target(SESSIONS, "runtime.load.SESSIONS")


def load_session(
    directory: Path,
    build: Build,
    files: Files = NO_FILES,
    *,
    batch: int = 1,
    threads: int | None = None,
) -> Session:
    """Load the graph or plan in `directory` on the backend of the build's target.

    `files` are those that the manifest lists; there are none while the bundle is being made. The
    session has `batch` rows. `threads` is for CPUs; None leaves the number to the backend. Raises
    MistralcError if the backend is not installed.
    """
    target = build.target
    try:
        return SESSIONS[target.name](directory, build, files, batch, threads)
    except ModuleNotFoundError as error:
        raise MistralcError(
            f"This bundle was built for the target {target.name} and needs {error.name}, which "
            f"is not installed here. Install it: pip install 'mistralc[{target.name}]'."
        ) from error


def import_backend(target: Target) -> None:
    """Import what the target's sessions run on; does nothing if it is not installed."""
    with suppress(ImportError):
        importlib.import_module(target.backend_module)


def make_ring(build: Build, rows: int = 1) -> Ring:
    """Make the ring that a session of this build starts with."""
    return Ring(build.spec, build.ring, rows, grows=build.target.ring_grows)


@dataclass(frozen=True, kw_only=True)  # no slots: `generator` is cached in the instance
class Loaded:
    """A bundle ready to run: the session, the ring it starts with, and the tokenizer.

    `defaults` is the checkpoint's `generation_config`. `threads` is the number asked for; None
    leaves it to the backend. The session has one user: either `generator` or one `Scheduler`.
    """

    bundle: Bundle
    session: Session
    ring: Ring
    tokenizer: Tokenizer
    defaults: dict[str, Any]
    seconds: float  # spent checking and loading
    threads: int | None = None

    @cached_property
    def generator(self) -> Generator:
        """The generator of one sequence, in the first row; made on first use."""
        return Generator(self.session, self.ring, self.bundle.manifest.model.vocab_size)


def load(
    source: Path | Bundle,
    *,
    rows: int = 1,
    threads: int | None = None,
    check: bool = True,
    require_signature: Path | None = None,
    stage: Stage = silent,
) -> Loaded:
    """Check the bundle at `source`, unless it is open already, and load it with `rows` rows.

    A generator uses the first row only; a scheduler (`Scheduler.of`) uses all of them.

    `check` replays a known text first. It raises MistralcError if the tokens differ from those
    recorded from the checkpoint, or if a batch-invariant bundle is not invariant on this processor.
    `require_signature` is passed to `open_bundle`.
    """
    began = perf_counter()
    if isinstance(source, Bundle):
        bundle = source
    else:
        with stage("Checking the bundle", None):
            bundle = open_bundle(source, require_signature=require_signature)
    path, manifest = bundle.path, bundle.manifest
    with stage("Loading the model", None):
        # Before the tokenizer, whose small blocks would lie between those of the weights.
        build = manifest.build
        session = load_session(path, build, manifest.files, batch=rows, threads=threads)
        tokenizer = Tokenizer.load(path)
        ring = make_ring(build, rows)
        session.resize(ring.capacities)
        if check:
            replay(session, ring, manifest.golden[:1], manifest.target)
            if manifest.batch_invariant:
                require_invariance(session, ring, manifest.golden[:1])
    return Loaded(
        bundle=bundle,
        session=session,
        ring=ring,
        tokenizer=tokenizer,
        defaults=json.loads((path / "generation_config.json").read_text(encoding="utf-8")),
        seconds=perf_counter() - began,
        threads=threads,
    )
