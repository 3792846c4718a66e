"""Compare two bundles: manifests, files, logits and speed. Prints nothing.

Logits are compared on the golden texts of both bundles, so no other text is needed. The bundles are
timed in turns, so that a busy period of the machine affects both.
"""

from collections import abc
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from graphs.errors import MistralcError
from graphs.manifest import Manifest
from runtime.backends.session import Ids, Logits
from runtime.bundle.open import Bundle
from runtime.decoding.sequence import Sequence
from runtime.load import import_backend, load_session, make_ring
from runtime.measure.bench import machine, resident_bytes
from runtime.measure.clocked_session import ClockedSession
from runtime.measure.perplexity import divergences
from runtime.system.progress import Stage, silent

WARM_UP, STEPS = 8, 64  # one-token steps of each bundle: not counted, and counted
BLOCK = 8  # steps of one bundle in a row: the other's threads still spin during the first ones

ABSENT = object()  # the value of a field that only the other manifest has


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A field of the manifest, as a path of names, and its value in each bundle."""

    field: tuple[str, ...]
    a: Any
    b: Any

    def to_json(self) -> dict[str, Any]:
        """Plain data; a bundle that does not have the field is left out."""
        sides = {"a": self.a, "b": self.b}
        said = {name: value for name, value in sides.items() if value is not ABSENT}
        return {"field": list(self.field), **said}


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A file's size in each bundle, None if it is missing, and whether the contents are equal."""

    name: str
    a: int | None
    b: int | None
    same: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsDifference:
    """How far the logits of A and B differ over `positions` of `texts` golden texts.

    `max_abs` is the largest difference of a logit, `top1` the share of positions where both prefer
    the same token; `kl` and `max_kl` are the mean and the maximum of KL(A || B) in nats.
    """

    texts: int
    positions: int
    max_abs: float
    top1: float
    kl: float
    max_kl: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Medians of `steps` one-token steps of each bundle, in milliseconds."""

    steps: int
    a_ms: float
    b_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of the bundle's files and of its full ring, and what the process grew by loading it.

    `resident`, the growth, is None if the bundle was not loaded.
    """

    files: int
    ring: int
    resident: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The result. `left_out` says what was not compared, and why."""

    identical: bool
    changes: tuple[Change, ...]
    files: tuple[File, ...]
    logits: LogitsDifference | None
    latency: Latency | None
    memory: tuple[Memory, Memory]
    left_out: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        a, b = self.memory
        return {
            "identical": self.identical,
            "manifest": [change.to_json() for change in self.changes],
            "files": [asdict(file) for file in self.files],
            "logits": None if self.logits is None else asdict(self.logits),
            "latency": None if self.latency is None else asdict(self.latency),
            "memory": {"a": asdict(a), "b": asdict(b)},
            "left_out": list(self.left_out),
            "machine": machine(),
        }


def compare(
    a: Bundle, b: Bundle, *, static: bool = False, threads: int | None = None, stage: Stage = silent
) -> Difference:
    """Compare two open bundles; `static` loads neither.

    If one cannot be loaded here, logits, latency and memory in use are left out.
    """
    one, two = a.manifest, b.manifest
    logits, latency, left_out = None, None, []
    memory = [_memory(one), _memory(two)]
    if static:
        left_out.append("logits and latency: --static was given")
    else:
        try:
            with stage("Loading both", None):
                sides = _load(a, threads), _load(b, threads)
        except MistralcError as error:
            left_out.append(f"logits, latency and memory in use: {error}")
        else:
            memory = [_memory(one, sides[0].resident), _memory(two, sides[1].resident)]
            with stage("Comparing logits", None):
                logits = _logits(sides, left_out)
            with stage("Timing", None):
                latency = _latency(sides, left_out)
    return Difference(
        identical=one.to_text() == two.to_text(),
        changes=tuple(changes(_fields(one), _fields(two))),
        files=tuple(files(one, two)),
        logits=logits,
        latency=latency,
        memory=(memory[0], memory[1]),
        left_out=tuple(left_out),
    )


def changes(a: Any, b: Any, field: tuple[str, ...] = ()) -> Iterator[Change]:
    """Yield every value that differs in two trees of plain data, in the order of `a`."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for name in dict.fromkeys([*a, *b]):
            yield from changes(a.get(name, ABSENT), b.get(name, ABSENT), (*field, name))
    elif _lists(a, b) and len(a) == len(b):
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            yield from changes(left, right, (*field, str(index)))
    elif a != b:
        yield Change(field=field, a=a, b=b)


def files(a: Manifest, b: Manifest) -> Iterator[File]:
    """Yield every file of either bundle, by name."""
    for name in sorted({*a.files, *b.files}):
        one, two = a.files.get(name), b.files.get(name)
        yield File(
            name=name,
            a=None if one is None else one.size,
            b=None if two is None else two.size,
            same=one == two,
        )


def _lists(a: Any, b: Any) -> bool:
    return isinstance(a, list | tuple) and isinstance(b, list | tuple)


def _fields(manifest: Manifest) -> dict[str, Any]:
    """A manifest's fields without its files, which are compared separately."""
    found = asdict(manifest)
    del found["files"]
    return found


def _memory(manifest: Manifest, resident: int | None = None) -> Memory:
    ring = manifest.contract.ring_bytes
    return Memory(files=manifest.file_bytes, ring=ring, resident=resident)


@dataclass(slots=True, kw_only=True)
class _Side:
    """A loaded bundle."""

    manifest: Manifest
    session: ClockedSession
    sequence: Sequence
    resident: int

    def restart(self) -> None:
        """Forget the text; the ring keeps its size."""
        self.sequence.ring.rewind(0)


def _load(bundle: Bundle, threads: int | None) -> _Side:
    build = bundle.manifest.build
    import_backend(build.target)  # the library's own memory belongs to neither bundle
    before = resident_bytes()
    session = ClockedSession(
        load_session(bundle.path, build, bundle.manifest.files, threads=threads)
    )
    sequence = Sequence(session, make_ring(build))
    sequence.step([0])  # the first step allocates what all later ones use
    grown = resident_bytes() - before
    return _Side(manifest=bundle.manifest, session=session, sequence=sequence, resident=grown)


def _logits(sides: tuple[_Side, _Side], left_out: list[str]) -> LogitsDifference | None:
    """Compare the logits at every position of both bundles' golden texts."""
    sizes = [side.manifest.model.vocab_size for side in sides]
    if sizes[0] != sizes[1]:
        left_out.append(f"logits: the vocabularies have {sizes[0]:,} and {sizes[1]:,} tokens")
        return None
    texts = golden_texts([side.manifest for side in sides])
    if not texts:
        left_out.append("logits: neither bundle has a golden text that both can hold")
        return None
    worst, kl, agreed = 0.0, [], 0
    for ids in texts:
        a, b = (_read(side, ids) for side in sides)  # [n, V]
        worst = max(worst, float(np.abs(a - b).max()))
        kl += [float(each) for block in divergences(a, b) for each in block]
        agreed += int((a.argmax(-1) == b.argmax(-1)).sum())
    return LogitsDifference(
        texts=len(texts), positions=len(kl), max_abs=worst, top1=agreed / len(kl),
        kl=sum(kl) / len(kl), max_kl=max(kl),
    )  # fmt: skip


def golden_texts(manifests: abc.Sequence[Manifest]) -> list[Ids]:
    """The distinct golden texts of the bundles that all of them can hold, ids [n] each."""
    found = dict.fromkeys(tuple(text["ids"]) for one in manifests for text in one.golden)
    room = [one.ring.context for one in manifests if not one.model.slides]
    return [np.array(ids, np.int64) for ids in found if len(ids) <= min(room, default=len(ids))]


def _read(side: _Side, ids: Ids) -> Logits:
    """Logits [n, V] of a text [n], read from an empty ring."""
    side.restart()
    pieces = side.sequence.feed(ids, np.arange(len(ids)))
    return np.concatenate([piece.logits.copy() for piece in pieces])


def _latency(sides: tuple[_Side, _Side], left_out: list[str]) -> Latency | None:
    """Time one-token steps of both bundles, in alternating blocks."""
    rooms = [side.manifest.ring.context for side in sides if not side.manifest.model.slides]
    steps = min([STEPS, *(room - WARM_UP for room in rooms)]) // BLOCK * BLOCK
    if steps < BLOCK:
        left_out.append(
            f"latency: a bundle that holds {min(rooms)} tokens is too short to be timed"
        )
        return None
    seconds: tuple[list[float], list[float]] = ([], [])
    for side in sides:
        side.restart()
    for _ in range((WARM_UP + steps) // BLOCK):
        for side, times in zip(sides, seconds, strict=True):
            times += [_timed_step(side) for _ in range(BLOCK)]
    a, b = (1e3 * median(times[WARM_UP:]) for times in seconds)
    return Latency(steps=steps, a_ms=a, b_ms=b)


def _timed_step(side: _Side) -> float:
    """Seconds that the session took for one step, without growing the ring."""
    side.session.seconds = 0.0
    side.sequence.step([0])
    return side.session.seconds
