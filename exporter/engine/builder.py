"""Compile an ONNX graph into a TensorRT plan, in this process. Knows nothing about bundles.

TensorRT 11 takes types and quantization from the graph, so little is left to configure: the shapes
that a step may have, and the GPUs to build for. TensorRT-RTX builds without a GPU, for every GPU
that it supports. The plan is streamed to disk as it is made: held as bytes, the plan of a 7B model
needs more memory than a build host has.
"""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from exporter.engine.addresses import fix_heap
from exporter.engine.progress import Meter, Progress, make_monitor
from exporter.engine.request import BuildRequest, EnginePlan
from exporter.engine.weights import MappedWeight, map_weights
from exporter.options import EngineOptions
from graphs.errors import MistralcError, UsageError
from graphs.targets import TARGETS, Target
from runtime.backends import kernel_cache, tensorrt_library

KEPT_WARNINGS = 50  # different warnings; a builder can repeat one for every layer


def build_here(request: BuildRequest, progress: Progress | None = None) -> EnginePlan:
    """Do what `process.build_engine` does, in this process."""
    target = TARGETS[request.target]
    trt = tensorrt_library.load(target)
    log = _make_log(trt)
    meter = Meter(request.weight_bytes, progress)
    with request.plan.open("wb") as file:
        builder = trt.Builder(log)
        network = builder.create_network()
        parser = trt.OnnxParser(network, log)
        weights = map_weights(request.graph)
        fix_heap()  # the graph's tensors come next, and the plan lists some in order of address
        if not _parse(parser, request.graph, weights):
            reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
            raise _failed("read the graph", reasons or log.errors, target)
        config = _make_config(trt, builder, request.options)
        _add_profiles(builder, config, request)
        config.progress_monitor = monitor = make_monitor(trt, meter)
        writer = _make_writer(trt, file, meter)
        fix_heap()  # again: the builder copies the tensors of each further profile
        with _timings(config, target, str(trt.__version__)):
            built = builder.build_serialized_network_to_stream(network, config, writer)
        if not built:
            raise _failed("build the engine", log.errors, target)
        del monitor, weights  # they had to outlive the build
        inputs, outputs = (
            {t.name: tuple(t.shape) for t in map(get, range(count))}
            for get, count in (
                (network.get_input, network.num_inputs),
                (network.get_output, network.num_outputs),
            )
        )
    return EnginePlan(
        nbytes=writer.nbytes,
        sha256=writer.digest.hexdigest(),
        version=str(trt.__version__),
        warnings=tuple(log.warnings),
        layers=tuple(log.layers),
        inputs=inputs,
        outputs=outputs,
    )


def _parse(parser: Any, graph: Path, weights: list[MappedWeight]) -> bool:
    """Give TensorRT the graph and the addresses of its weights."""
    return bool(
        parser.load_model_proto(graph.read_bytes(), str(graph))
        and all(parser.load_initializer(w.name, w.data.ctypes.data, w.data.nbytes) for w in weights)
        and parser.parse_model_proto()
    )


@contextmanager
def _timings(config: Any, target: Target, version: str) -> Iterator[None]:
    """Let TensorRT reuse kernel timings of earlier builds on this host, and save the new ones.

    TensorRT-RTX times no kernels while it builds, only when the engine first runs.
    """
    path = kernel_cache.timing_file(version) if target.kernel_timings else None
    if path is None:
        yield
        return
    config.set_timing_cache(config.create_timing_cache(kernel_cache.read(path) or b""), True)
    yield
    kernel_cache.write(path, bytes(config.get_timing_cache().serialize()))


def _add_profiles(builder: Any, config: Any, request: BuildRequest) -> None:
    """Give every input of the graph its range of shapes, in each optimization profile."""
    contract = request.contract
    for ranges in request.profiles:
        profile = builder.create_optimization_profile()
        for row in contract.inputs:
            shapes = (row.sized({**sizes, **contract.capacities}) for sizes in ranges)
            profile.set_shape(row.name, *shapes)
        config.add_optimization_profile(profile)


def _make_config(trt: Any, builder: Any, options: EngineOptions) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = (
        trt.ProfilingVerbosity.DETAILED
    )  # lists layers by name, for the audit
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
            f"--gpu is {name!r}; TensorRT-RTX {trt.__version__} builds for {', '.join(known)}. "
            "Give one of these."
        )
    return known[name.lower()]


def _failed(doing: str, errors: list[str], target: Target) -> MistralcError:
    reason = re.sub(r"\s+", " ", " ".join(errors) or "it gave no reason").strip()
    package = target.distributions[0]
    return MistralcError(
        f"TensorRT could not {doing}: {reason[:600]}. Nothing was left behind. If memory ran out, "
        f"build on a host with more; otherwise report this with the version of {package}."
    )


def _make_log(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps errors, warnings and the layer list out of the thousands of lines of a build."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.warnings: dict[str, None] = {}
            self.errors: list[str] = []
            self.layers: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            """Keep one message, if it matters."""
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING and len(self.warnings) < KEPT_WARNINGS:
                self.warnings[message] = None
            elif message.startswith("Layers:\n"):
                self.layers = message.splitlines()[1:]

    return Log()


def _make_writer(trt: Any, file: BinaryIO, meter: Meter) -> Any:
    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        """Writes and hashes the plan while it is made."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.nbytes, self.digest = 0, hashlib.sha256()

        def write(self, data: bytes) -> int:
            """Write the next bytes of the plan."""
            self.digest.update(data)
            self.nbytes += len(data)
            meter.write(self.nbytes)
            return file.write(data)

    return Writer()
