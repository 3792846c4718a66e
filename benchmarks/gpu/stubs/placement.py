"""Open a bundle of the target `cuda` over stub libraries and report what ONNX Runtime does with it.

    python -m benchmarks.gpu.stubs.placement BUNDLE [--batch N]

Run by `prove.py` in an environment of stubs; see `environment` there. The bundle is opened by the
product's own session. Prints one line of JSON: where every node runs, whether decoding is captured
as a CUDA graph, and what a step launches and copies. Logits are meaningless: kernels do nothing.
"""

import argparse
import ctypes
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from benchmarks.gpu.variants import SHIPPED, VARIANTS, variant_build
from graphs.build import Build
from graphs.manifest import read_manifest
from runtime.backends.onnxruntime_cuda import CudaOrtSession
from runtime.decoding.sequence import Sequence
from runtime.load import load_session, make_ring

VERBOSE = 0  # ONNX Runtime's log level
WARM = 4  # single steps before one is counted: ONNX Runtime captures the second or third
PLACED = re.compile(r"placed on \[(\w+)\]\. Number of nodes: (\d+)")
NODE = re.compile(r"VerifyEachNodeIsAssignedToAnEp\]\s+(\w+) \((.*)\)\s*$")
MEMCPY = re.compile(r"(\d+) Memcpy nodes are added")
ATTENTION = re.compile(r"(\w*Attention): using ([\w ]+?) \(", re.IGNORECASE)
KERNEL = re.compile(r"(__)?cudaLaunch(Cooperative)?Kernel")
COPY, ALLOCATION = re.compile(r"copy\."), re.compile("cudaMalloc")
PRODUCT = re.compile(r"cublas\w*(Gemm|Matmul$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """Calls of the stub libraries, by function: in all, and while a graph was captured.

    `nbytes` and `largest` are the bytes of all calls, and of the largest.
    """

    count: Mapping[str, int]
    recorded: Mapping[str, int]
    nbytes: Mapping[str, int]
    largest: Mapping[str, int]

    def summary(self) -> dict[str, int]:
        """What was launched, copied and allocated."""
        inside = "copy.device_to_device"
        return {
            "kernels": _sum(self.count, KERNEL),
            "products": _sum(self.count, PRODUCT),
            "graphs": self.count.get("cudaGraphLaunch", 0),
            "captures": self.count.get("cudaStreamEndCapture", 0),
            "recorded": _sum(self.recorded, KERNEL) + _sum(self.recorded, PRODUCT),
            "recorded_host_copies": _sum(self.recorded, COPY) - self.recorded.get(inside, 0),
            "host_copies": _sum(self.count, COPY) - self.count.get(inside, 0),
            "host_copied_bytes": _sum(self.nbytes, COPY) - self.nbytes.get(inside, 0),
            "largest_device_copy": self.largest.get(inside, 0),
            "allocations": _sum(self.count, ALLOCATION),
        }


def _sum(numbers: Mapping[str, int], names: re.Pattern[str]) -> int:
    return sum(number for name, number in numbers.items() if names.match(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--variant", choices=VARIANTS, default=SHIPPED)
    arguments = parser.parse_args()
    with tempfile.TemporaryFile("w+") as log:
        with redirected_errors(log.fileno()):
            found = observe(arguments.bundle, arguments.batch, arguments.variant)
        log.seek(0)
        print(json.dumps({**placement(log.read()), **found}))


def observe(bundle: Path, batch: int, variant: str) -> dict[str, Any]:
    """Open the bundle and run steps of every kind; returns what they launched and copied."""
    build = variant_build(read_manifest(bundle).build, variant)
    verbose_sessions()
    session: Any = load_session(bundle, build, batch=batch)
    assert isinstance(session, CudaOrtSession)
    try:
        return {
            "captured": session.captured,
            "shared": shared_memory(session),
            "inputs_bytes": session._buffers._block.nbytes,
            "logits_bytes": session._buffers._logits_bytes(1),
            "smallest_cache_bytes": min(
                session._buffers._cache_bytes(name)
                for name in session._buffers.addresses
                if name.startswith("past_")
            ),
            **steps(session, build, batch),
        }
    finally:
        session.close()


def steps(session: CudaOrtSession, build: Build, batch: int) -> dict[str, Any]:
    """Single steps, chunks and single steps again, until every ring has wrapped twice."""
    library = ctypes.CDLL("libcudart.so.13")
    sequence = Sequence(session, make_ring(build), batch)
    ids = np.zeros(build.ring.chunk, np.int64)
    found: dict[str, Any] = {"single": [], "chunk": [], "after": []}

    def take(kind: str, count: int) -> None:
        library.stub_reset()
        sequence.step(ids[:count])
        found[kind].append(calls(library).summary())

    room = build.ring.context if not build.spec.slides else None
    last = 2 * max(build.contract.capacities.values()) + 5
    for _ in range(WARM):
        take("single", 1)
    while sequence.position < last and (room is None or sequence.position + WARM < room):
        count = next(
            sequence.ring.pieces(
                build.ring.chunk
                if room is None
                else min(build.ring.chunk, room - sequence.position)
            )
        )
        take("chunk" if count > 1 else "after", count)  # fmt: skip
        if room is None or sequence.position < room:
            take("after", 1)
    return found


def placement(log: str) -> dict[str, Any]:
    """What ONNX Runtime's verbose log says of the session that was opened last."""
    last = log[max(0, log.rfind("Node placements")) :]
    copies = MEMCPY.findall(log)
    nodes = {provider: int(count) for provider, count in PLACED.findall(last)}
    return {
        "nodes": nodes,
        "on_cpu": _nodes_of(last, "CPUExecutionProvider"),
        "memcpy_nodes": int(copies[-1]) if copies else 0,
        "attention": sorted({f"{kind}: {how}" for kind, how in ATTENTION.findall(log)}),
    }


def _nodes_of(log: str, provider: str) -> list[str]:
    """The operators placed on a provider; ONNX Runtime lists them if there is more than one."""
    _, found, rest = log.partition(f"placed on [{provider}]")
    names = []
    for line in rest.splitlines()[1:] if found else ():
        node = NODE.search(line)
        if node is None:
            break
        names.append(node[1])
    return names


def shared_memory(session: CudaOrtSession) -> list[str]:
    """Pairs of bound tensors that share memory, apart from a cache's past and present."""
    buffers = session._buffers
    sizes = session.contract.sizes(batch=session.batch, tokens=1, wanted=1)
    tensors = {
        t.name: t.sized(sizes) for t in (*session.contract.inputs, *session.contract.outputs)
    }
    spans = {}
    for name, shape in tensors.items():
        begin = buffers.addresses.get(name, buffers.logits(1).device)
        item = 8 if name in ("input_ids", "position_ids", "logits_indices") else 2
        spans[name] = begin, begin + item * int(np.prod(shape))
    return [
        f"{a} and {b}"
        for (a, (a0, a1)), (b, (b0, b1)) in combinations(spans.items(), 2)
        if a0 < b1 and b0 < a1 and b != a.replace("past_", "present_", 1)
    ]


def calls(library: Any) -> Calls:
    """Read the counters of the stub libraries, which the stub of the CUDA runtime holds."""
    text = ctypes.create_string_buffer(1 << 16)
    library.stub_report.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    library.stub_report(text, len(text))
    rows = [line.split() for line in text.value.decode().splitlines()]
    columns = [{name: int(values[i]) for name, *values in rows} for i in range(4)]
    count, recorded, nbytes, largest = columns
    return Calls(count=count, recorded=recorded, nbytes=nbytes, largest=largest)


def verbose_sessions() -> None:
    """Let every session that is made from here on log where its nodes are placed."""
    real: Any = ort.InferenceSession
    ort.set_default_logger_severity(VERBOSE)

    def session(model: Path, options: Any, providers: Any) -> Any:
        options.log_severity_level = VERBOSE
        return real(model, options, providers)

    ort.InferenceSession = session


@contextmanager
def redirected_errors(file: int) -> Iterator[None]:
    """Write what this process prints to standard error into `file`, also from C++."""
    kept = os.dup(2)
    os.dup2(file, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


if __name__ == "__main__":
    main()
