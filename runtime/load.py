"""Load a checked bundle: session, ring and tokenizer. Knows nothing about commands.

The backend is imported here, when it is needed, and nowhere else.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

from graphs.errors import MistralcError
from graphs.manifest import Manifest
from graphs.quant_scheme import QUANTIZED
from graphs.spec import ITEM_SIZE, PADDED
from runtime.backends import kernel_cache
from runtime.backends.session import Session
from runtime.bundle.open import Bundle, open_bundle
from runtime.bundle.sizes import file_bytes
from runtime.decoding.generator import Generator
from runtime.decoding.golden import replay, require_invariance
from runtime.decoding.ring import Ring
from runtime.system.malloc import huge_pages
from runtime.system.progress import Stage, silent
from runtime.text.tokenizer import Tokenizer

# Bytes of a head's keys up to which attention without blocks was the faster one: 267 us beside 368
# for SmolLM2's layers at 4,096 tokens, 263 beside 284 for Mistral-7B's at 512 and 1,154 beside
# 1,160 at 2,048, but 2,628 beside 2,346 at 4,096 (2 threads, 1 MiB of second-level cache each).
CACHED = 2 << 20


def load_session(
    directory: Path, manifest: Manifest, *, batch: int = 1, threads: int | None = None
) -> Session:
    """Load the graph or plan in `directory` on the backend that the manifest's target names."""
    spec, ring, activation = manifest.model, manifest.ring, manifest.activation
    try:
        if manifest.target == "cpu":
            from runtime.backends.onnxruntime_cpu import OrtSession

            on_huge_pages = _bytes_on_huge_pages(manifest)
            with huge_pages(on_huge_pages):
                return OrtSession(
                    directory / "model.onnx", spec, batch=batch, threads=threads,
                    fuse_qdq=manifest.precision != "fp8", pack_together=not on_huge_pages,
                    flash=_keys_of_a_head(manifest) > CACHED,
                    padded=PADDED if manifest.batch_invariant else 0,
                )  # fmt: skip
        if manifest.target == "cuda":
            from runtime.backends.onnxruntime_cuda import CudaOrtSession

            return CudaOrtSession(directory / "model.onnx", spec, ring, activation, batch=batch)
        from runtime.backends.tensorrt import TrtSession

        entry = manifest.files.get("engine.plan")  # none while the bundle is being made
        return TrtSession(
            directory / "engine.plan", spec, ring, activation, manifest.target, batch=batch,
            cache=None if entry is None else kernel_cache.cache_file(entry.sha256),
        )  # fmt: skip
    except ModuleNotFoundError as error:
        raise MistralcError(
            f"This bundle was built for the target {manifest.target} and needs {error.name}, which "
            f"is not installed here. Install it: pip install 'mistralc[{manifest.target}]'."
        ) from error


def _bytes_on_huge_pages(manifest: Manifest) -> int:
    """Room for quantized weights as ONNX Runtime packs them; 1.3 times the files were seen.

    0 for others, which are not there for speed: where a host takes free memory away from its
    virtual machines and clears it anew, huge pages took SmolLM2's 538 MB from 0.6 to 1.9 s.
    """
    if manifest.precision not in QUANTIZED:
        return 0
    return 3 * file_bytes(manifest) // 2


def _keys_of_a_head(manifest: Manifest) -> int:
    """Bytes that a head's keys have in a full ring; 0 where every layer has a window."""
    spec, ring = manifest.model, manifest.ring
    slots = ring.capacity(None) if None in spec.windows else 0
    return slots * spec.head_dim * ITEM_SIZE[manifest.activation]


def make_ring(manifest: Manifest, rows: int = 1) -> Ring:
    """Make the ring that a session of this bundle starts with; only ONNX Runtime CPU's grows."""
    return Ring(manifest.model, manifest.ring, rows, grows=manifest.target == "cpu")


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
        session = load_session(path, manifest, batch=rows, threads=threads)
        tokenizer = Tokenizer.load(path)
        ring = make_ring(manifest, rows)
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
