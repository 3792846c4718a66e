"""From an ONNX graph to a TensorRT plan on disk. Knows nothing about checkpoints or bundles.

TensorRT 11 takes types and quantization from the graph, so there is little to configure: the
shapes that a step may have, and the GPUs to build for. TensorRT-RTX builds without a GPU, for every
one that it supports. The plan is streamed to disk as it is made; asked for as bytes, that of a 7B
needs more memory than a build host has.

TensorRT runs in a process of its own. There the same graph gives the same plan, bit for bit (beside
torch in one process it does not: lists in the plan follow the heap's addresses); what it allocates
is measured alone; and if the kernel kills it for memory, that is an error message and not our end.
"""

import ctypes
import hashlib
import json
import mmap
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np
import onnx
from numpy.typing import NDArray

from exporter.options import EngineOptions
from graphs.contract import GraphContract
from graphs.errors import MistralcError, UsageError
from graphs.spec import ModelSpec, RingSpec
from graphs.targets import TARGETS, Target
from runtime.backends import kernel_cache, tensorrt_library
from runtime.system.host import memory_available

Progress = Callable[[int], None]  # called with the number of bytes just compiled or written

BUILDER = (sys.executable, "-P", "-m", "exporter.engine.build")  # the process that builds

KEPT_VARIABLES = ("CUDA", "HOME", "LD_", "NVIDIA", "PATH", "TMPDIR", "XDG_CACHE_HOME")
"""How the names of the environment's variables begin that the process of a build is given."""

KEPT_WARNINGS = 50  # of different text; a builder can repeat one for every layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A finished plan: its size and SHA-256, and what building it said.

    `layers` is TensorRT's own list of the engine's layers, one line each.
    """

    nbytes: int
    sha256: str
    version: str
    warnings: tuple[str, ...]
    layers: tuple[str, ...]
    inputs: Mapping[str, tuple[int, ...]]
    outputs: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """What to build: the ONNX file `graph`, with the ring's capacity fixed in it, into `plan`."""

    graph: Path
    plan: Path
    contract: GraphContract
    target: str
    options: EngineOptions = field(default_factory=EngineOptions)

    def to_text(self) -> str:
        """Return JSON, for the builder's process."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read what `to_text` wrote."""
        data = json.loads(text)
        options = {**data["options"], "gpus": tuple(data["options"]["gpus"])}
        return cls(**{
            **data, "graph": Path(data["graph"]), "plan": Path(data["plan"]),
            "contract": GraphContract(
                spec=ModelSpec.from_json(data["contract"]["spec"]),
                ring=RingSpec(**data["contract"]["ring"]),
                activation=data["contract"]["activation"],
            ),
            "options": EngineOptions(**options),
        })  # fmt: skip

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that the graph points to, which a plan has about as many of."""
        return sum(weight.length for weight in _stored_weights(self.graph))

    @property
    def work(self) -> int:
        """How far progress counts, in bytes: compiling takes as long as writing, roughly."""
        return 2 * self.weight_bytes


def build_engine(request: BuildRequest, progress: Progress | None = None) -> Plan:
    """Compile the graph of `request` into its plan; `progress` counts up to `request.work`.

    Raises MistralcError with TensorRT's own words when it cannot.
    """
    folder = str(Path(__file__).resolve().parents[2])
    with subprocess.Popen(  # noqa: S603
        BUILDER,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=request.graph.parent, env=_environment(folder),
    ) as child:  # fmt: skip
        try:
            return _followed(child, request, progress)
        except BaseException:
            child.kill()
            raise


def _environment(folder: str) -> dict[str, str]:
    """What the builder's process needs to know; anything more moves what comes after it in memory.

    A time zone or a hash seed that was set gave another plan of the same graph; so did another
    order of the same variables.
    """
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = dict.fromkeys([folder, *filter(None, given)])
    kept = {name: value for name, value in os.environ.items() if name.startswith(KEPT_VARIABLES)}
    found = {**kept, "PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "0"}
    return dict(sorted(found.items()))


def _followed(
    child: subprocess.Popen[str], request: BuildRequest, progress: Progress | None
) -> Plan:
    """Hand the request to the builder's process, pass its steps on, and take its answer."""
    if child.stdin is None or child.stdout is None:
        raise ValueError("the process was started without pipes")
    # Names without their folder, whose length would move what TensorRT puts on the heap after them.
    here = request.graph.parent
    plan = Path(os.path.relpath(request.plan, here))
    child.stdin.write(replace(request, graph=Path(request.graph.name), plan=plan).to_text())
    child.stdin.close()
    for line in child.stdout:
        answer = json.loads(line)
        if "step" in answer and progress is not None:
            progress(answer["step"])
        if "error" in answer:
            raise (UsageError if answer["usage"] else MistralcError)(answer["error"])
        if "plan" in answer:
            fields: dict[str, Any] = dict(answer["plan"])
            for name in ("warnings", "layers"):
                fields[name] = tuple(fields[name])
            for name in ("inputs", "outputs"):
                fields[name] = {key: tuple(shape) for key, shape in fields[name].items()}
            return Plan(**fields)
    code = child.wait()
    killed = " for want of memory, it seems" if code == -signal.SIGKILL else ""
    raise MistralcError(
        f"The process that builds the engine ended{killed} (exit status {code}) before the plan "
        f"was complete; nothing was left behind. {memory_advice()}"
    )


def memory_advice() -> str:
    """Say how much memory there is, and what to do about it."""
    available = memory_available()
    here = "" if available is None else f"{available / 1e9:.1f} GB are available here; "
    return f"{here}build on a host with more memory, or without --two-profiles."


ADDR_NO_RANDOMIZE = 0x0040000  # personality(2)


def fix_addresses() -> None:
    """Start this process again with its memory at the same addresses every time.

    The order of some lists in a plan follows addresses: of 24 builds of one graph, side by side,
    one was different, and builds in folders whose names differ in length were. Where the kernel
    does not allow it, that is how it stays.
    """
    personality = ctypes.CDLL(None).personality
    current = personality(0xFFFFFFFF)  # asks, and changes nothing
    if current == -1 or current & ADDR_NO_RANDOMIZE:
        return
    if personality(current | ADDR_NO_RANDOMIZE) != -1:
        os.execv(sys.executable, BUILDER)  # noqa: S606


def main() -> None:
    """Build what standard input asks for; answer in JSON, a line for each step and the last one."""
    fix_addresses()
    # TensorRT writes to standard output itself: keep it for answers, give it standard error.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(message: Mapping[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    request = BuildRequest.from_text(sys.stdin.read())
    try:
        plan = build_here(request, lambda count: answer({"step": count}))
    except MistralcError as error:
        answer({"error": str(error), "usage": isinstance(error, UsageError)})
    except OSError as error:  # the disk, most likely: let the caller's own handling explain it
        answer({"error": f"The plan could not be written: {error}.", "usage": False})
    else:
        answer({"plan": asdict(plan)})


def build_here(request: BuildRequest, progress: Progress | None = None) -> Plan:
    """Do what `build_engine` does, in this process."""
    contract, target = request.contract, TARGETS[request.target]
    trt = tensorrt_library.load(target)
    log = _log(trt)
    meter = _Meter(request.weight_bytes, progress)
    with request.plan.open("wb") as file:
        builder = trt.Builder(log)
        network = builder.create_network()
        parser = trt.OnnxParser(network, log)
        weights = _map_weights(request.graph)
        if not _parse(parser, request.graph, weights):
            reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
            raise _failed("read the graph", reasons or log.errors, target)
        config = _config(trt, builder, request.options)
        for least, best, most in profile_shapes(contract.ring, two=request.options.two_profiles):
            profile = builder.create_optimization_profile()
            for row in contract.inputs:
                sizes = [
                    row.sized({**letters, **contract.capacities}) for letters in (least, best, most)
                ]
                profile.set_shape(row.name, *sizes)
            config.add_optimization_profile(profile)
        config.progress_monitor = monitor = _monitor(trt, meter)
        writer = _writer(trt, file, meter)
        with _timings(config, target, str(trt.__version__)):
            built = builder.build_serialized_network_to_stream(network, config, writer)
        if not built:
            raise _failed("build the engine", log.errors, target)
        del monitor, weights  # they had to outlive the build
        tensors = [
            {t.name: tuple(t.shape) for t in map(get, range(count))}
            for get, count in (
                (network.get_input, network.num_inputs),
                (network.get_output, network.num_outputs),
            )
        ]
    return Plan(
        nbytes=writer.nbytes,
        sha256=writer.digest.hexdigest(),
        version=str(trt.__version__),
        warnings=tuple(log.warnings),
        layers=tuple(log.layers),
        inputs=tensors[0],
        outputs=tensors[1],
    )


class Mapped(NamedTuple):
    """The bytes of one weight in a mapped file."""

    name: str
    data: NDArray[np.uint8]


class StoredWeight(NamedTuple):
    """Where the graph says that the bytes of one weight lie."""

    name: str
    path: Path
    offset: int
    length: int


def _stored_weights(graph: Path) -> list[StoredWeight]:
    found = []
    for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place:
            path = graph.parent / place["location"]
            range_ = int(place["offset"]), int(place["length"])
            found.append(StoredWeight(tensor.name, path, *range_))
    return found


def _map_weights(graph: Path) -> list[Mapped]:
    """Map what the graph keeps in other files, so that the builder's copy is the only one.

    TensorRT's own loader reads it all into memory first: 14.5 GB of a 7B, on top of the layouts
    that the builder makes of them.
    """
    files: dict[Path, NDArray[np.uint8]] = {}
    found = []
    for name, path, offset, length in _stored_weights(graph):
        if path not in files:
            files[path] = _mapped(path)
        found.append(Mapped(name, files[path][offset : offset + length]))
    return found


def _mapped(path: Path) -> NDArray[np.uint8]:
    """Map a file, which numpy.memmap would remember by its folder too."""
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def _parse(parser: Any, graph: Path, weights: list[Mapped]) -> bool:
    """Give TensorRT the graph and the addresses of its weights."""
    return bool(
        parser.load_model_proto(graph.read_bytes(), str(graph))
        and all(parser.load_initializer(w.name, w.data.ctypes.data, w.data.nbytes) for w in weights)
        and parser.parse_model_proto()
    )


@contextmanager
def _timings(config: Any, target: Target, version: str) -> Iterator[None]:
    """Let TensorRT reuse its measurements of an earlier build on this host, and keep the new ones.

    TensorRT-RTX measures no kernels while it builds: it does when the engine first runs.
    """
    path = kernel_cache.timing_file(version) if target.kernel_timings else None
    if path is None:
        yield
        return
    config.set_timing_cache(config.create_timing_cache(kernel_cache.read(path) or b""), True)
    yield
    kernel_cache.write(path, bytes(config.get_timing_cache().serialize()))


def profile_shapes(ring: RingSpec, *, two: bool) -> list[tuple[Mapping[str, int], ...]]:
    """The least, best and most of each letter, for each optimization profile.

    One profile covers everything from one token to a chunk and is tuned for one token, which is
    what most steps have.
    """
    least = {"B": 1, "S": 1, "T": 1}
    most = {"B": ring.max_batch, "S": ring.chunk, "T": ring.chunk}
    if not two:
        return [(least, least, most)]
    decode = {"B": ring.max_batch, "S": 1, "T": 1}
    return [(least, least, decode), (least, {**least, "S": ring.chunk}, most)]


def _config(trt: Any, builder: Any, options: EngineOptions) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # names layers, for the audit
    if options.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if options.gpus:
        config.num_compute_capabilities = len(options.gpus)
        for i, name in enumerate(options.gpus):
            config.set_compute_capability(_capability(trt, name), i)
    return config


def _capability(trt: Any, name: str) -> Any:
    known = {k.lower(): v for k, v in trt.ComputeCapability.__members__.items() if k[:2] == "SM"}
    if name.lower() not in known:
        raise UsageError(
            f"--gpu is {name!r}; TensorRT-RTX {trt.__version__} builds for {', '.join(known)}."
        )
    return known[name.lower()]


def _failed(doing: str, errors: list[str], target: Target) -> MistralcError:
    words = re.sub(r"\s+", " ", " ".join(errors) or "it gave no reason").strip()
    package = target.distributions[0]
    return MistralcError(
        f"TensorRT could not {doing}: {words[:600]}. Nothing was left behind. If memory ran out, "
        f"build on a host with more; else report this with the version of {package}."
    )


def _log(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps what a person must know of the thousands of lines that a build says."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.warnings: dict[str, None] = {}
            self.errors: list[str] = []
            self.layers: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            """Take one message."""
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING and len(self.warnings) < KEPT_WARNINGS:
                self.warnings[message] = None
            elif message.startswith("Layers:\n"):
                self.layers = message.splitlines()[1:]

    return Log()


class _Meter:
    """Progress in bytes, up to twice the weights': half for compiling, half for writing."""

    def __init__(self, nbytes: int, progress: Progress | None) -> None:
        self.nbytes, self.progress = nbytes, progress
        self.compiled, self.reported = 0.0, 0

    def compile(self, share: float) -> None:
        """Compiling has come this far, 0 to 1; it never goes back."""
        self.compiled = max(self.compiled, min(1.0, share))
        self._report(int(self.compiled * self.nbytes))

    def write(self, nbytes: int) -> None:
        """So many bytes of the plan are written; nothing is left to compile."""
        self._report(min(self.nbytes + nbytes, 2 * self.nbytes))

    def _report(self, done: int) -> None:
        if self.progress is not None and done > self.reported:
            self.progress(done - self.reported)
            self.reported = done


class Phases:
    """How far nested phases have come: each is one step of the phase that it is part of."""

    def __init__(self) -> None:
        self._steps: dict[str, list[int]] = {}  # by phase, outermost first: steps done, and all

    def start(self, name: str, steps: int) -> None:
        """Begin a phase, inside the one that began last."""
        self._steps[name] = [0, max(1, steps)]

    def finish(self, name: str) -> None:
        """End a phase."""
        self._steps.pop(name, None)

    def step(self, name: str, done: int) -> None:
        """Count the steps done of a phase."""
        if name in self._steps:
            self._steps[name][0] = done

    @property
    def share(self) -> float:
        """How much of the outermost phase is done, 0 to 1."""
        share = 0.0
        for done, steps in reversed(self._steps.values()):
            share = min(1.0, (done + share) / steps)
        return share


def _monitor(trt: Any, meter: _Meter) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Follows the builder's phases; TensorRT calls it from its own threads."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases = Phases()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:  # noqa: ARG002
            """Begin a phase."""
            self.phases.start(phase_name, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            """End a phase."""
            self.phases.finish(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            """Count one step; True lets the builder go on."""
            self.phases.step(phase_name, step + 1)
            meter.compile(self.phases.share)
            return True

    return Monitor()


def _writer(trt: Any, file: BinaryIO, meter: _Meter) -> Any:
    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        """Writes and hashes the plan as it comes."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.nbytes, self.digest = 0, hashlib.sha256()

        def write(self, data: bytes) -> int:
            """Take the next bytes of the plan."""
            self.digest.update(data)
            self.nbytes += len(data)
            meter.write(self.nbytes)
            return file.write(data)

    return Writer()


if __name__ == "__main__":
    main()
