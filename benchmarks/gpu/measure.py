"""Measure one bundle on this GPU, for `check.py` and `speed.py`.

Measured are the latency of a step by position, the time of a prompt, and how much of the GPU's
bandwidth a step uses, compared with the data sheet and with copies within the GPU's memory.
"""

import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from exporter.estimate.model import estimate
from graphs.build import Build
from graphs.gpu_catalogue import GPUS, Gpu
from graphs.manifest import read_manifest
from runtime.decoding.ring import ContextFullError
from runtime.load import Files, load_session, make_ring
from runtime.system import host

POSITIONS = (4096, 8192, 16_384, 32_768, 65_536)
STEPS = 64  # per position; the median is reported
PROMPT = 2048  # tokens
PROMPTS = 6  # the first is a warm-up
COPY_BYTES, COPIES = 1 << 28, 10


def measure(bundle: Path, build: Build, batches: Sequence[int]) -> dict[str, Any]:
    """Measure one bundle in this process, for each batch size."""
    files = read_manifest(bundle).files
    device = host.cuda().devices[0]
    gpu = catalogue_entry(device)
    copy = copy_bandwidth()
    return {
        "copy_bytes_per_s": copy,
        "datasheet_bytes_per_s": gpu and gpu.bandwidth_bytes_per_s,
        "by_batch": [
            {**measure_batch(session, build, session.batch, copy, gpu), "load_s": seconds}
            for session, seconds in sessions(bundle, build, files, batches)
        ],
    }


def sessions(
    bundle: Path, build: Build, files: Files, batches: Sequence[int]
) -> Iterator[tuple[Any, float | None]]:
    """A session for each batch size, and the seconds that loading took.

    All share the weights of the first, which is loaded once; the seconds of the others are None.
    """
    began = perf_counter()
    first: Any = load_session(bundle, build, files, batch=batches[0])
    with closing(first):
        yield first, perf_counter() - began
        for batch in batches[1:]:
            with closing(first.with_rows(batch)) as session:
                yield session, None


def measure_batch(
    session: Any, build: Build, batch: int, copy: float, gpu: Gpu | None
) -> dict[str, Any]:
    """Measure a session with `batch` rows; `copy` is the copy bandwidth in bytes per second."""
    ttft = prompt_seconds(session, build, batch)
    latency = {p: s for p in POSITIONS if (s := step_seconds(session, build, batch, p))}
    ring = replace(build.ring, max_batch=batch)
    batched = replace(build, contract=replace(build.contract, ring=ring))
    read = estimate(batched).step_bytes
    first, last = (latency[end(latency)] for end in (min, max)) if latency else (None, None)
    return {
        "batch": batch,
        "captured": session.captured,
        "prompt_tokens": PROMPT,
        "ttft_s": ttft,
        "decode_s_at": latency,
        "flatness": last / first if first and last else None,
        "tokens_per_s": batch / first if first else None,
        "step_bytes": read,
        "of_copy": read / first / copy if first else None,
        "of_datasheet": read / first / gpu.bandwidth_bytes_per_s if first and gpu else None,
    }


def prompt_seconds(session: Any, build: Build, batch: int) -> float | None:
    """Seconds for PROMPT tokens: median after a warm-up; None if they do not fit."""
    seconds = []
    for _ in range(PROMPTS):
        ring = make_ring(build)
        try:
            pieces = list(ring.pieces(PROMPT))
        except ContextFullError:
            return None
        began, here = perf_counter(), 0
        for count in pieces:
            ids = np.full((batch, count), here % build.spec.vocab_size)
            positions = np.tile(np.arange(here, here + count), (batch, 1))
            session.step(ids, positions, np.full((batch, 1), count - 1))
            here += count
        seconds.append(perf_counter() - began)
    return median(seconds[1:])


def step_seconds(session: Any, build: Build, batch: int, position: int) -> float | None:
    """Median seconds of a one-token step before `position`; None beyond the context.

    The ring is not filled first: the time of a step does not depend on its contents.
    """
    if not build.spec.slides and position > build.ring.context:
        return None
    one, seconds = np.zeros((batch, 1), np.int64), []
    for here in range(position - STEPS, position):
        began = perf_counter()
        session.step(one, one + here, one)
        seconds.append(perf_counter() - began)
    return median(seconds)


def copy_bandwidth() -> float:
    """Bytes read and written per second by copies within GPU memory."""
    from runtime.backends.cuda_device import Gpu as Open

    device = Open("cuda")
    try:
        source, to = (device.allocate(COPY_BYTES, "a measurement") for _ in range(2))
        kind = device._cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice

        def run() -> float:
            device.wait()
            began = perf_counter()
            for _ in range(COPIES):
                device.call("cudaMemcpyAsync", to, source, COPY_BYTES, kind, device._stream)
            device.wait()
            return perf_counter() - began

        return 2 * COPIES * COPY_BYTES / min(run() for _ in range(5))
    finally:
        device.close()


def catalogue_entry(device: host.Device) -> Gpu | None:
    """The catalogue's entry for a device: same capability, memory within 15%, matching name."""
    name = "".join(c for c in device.name.lower() if c.isalnum())

    def fits(item: tuple[str, Gpu]) -> bool:
        key, gpu = item
        return (
            gpu.compute_capability == device.compute_capability
            and abs(device.memory_bytes / gpu.memory_bytes - 1) < 0.15
            and key.partition("-")[0] in name
            and ("pcie" in key) == ("pcie" in name)
        )

    return next((gpu for _, gpu in filter(fits, GPUS.items())), None)


class MemoryPeak:
    """Peak memory in use on the first GPU, by all processes, since `peak` was last set to 0."""

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "MemoryPeak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        command = ["nvidia-smi", "--id=0", "--query-gpu=memory.used",
                   "--format=csv,noheader,nounits"]  # fmt: skip
        while not self._stop.wait(0.2):
            with suppress(OSError, ValueError, subprocess.SubprocessError):
                output = subprocess.run(
                    command, capture_output=True, text=True, timeout=10, check=True
                ).stdout
                self.peak = max(self.peak, int(output) << 20)
