"""Measure how fast a bundle runs on this machine. Knows nothing about peers or correctness."""

import importlib.util
import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphs.errors import MistralcError, UsageError
from graphs.manifest import Manifest
from runtime.backends.session import Session
from runtime.bundle.sizes import step_bytes
from runtime.decoding.sampling import SamplingParams
from runtime.decoding.sequence import Sequence
from runtime.load import Loaded, make_ring
from runtime.measure.clocked_session import ClockedSession
from runtime.system.host import BACKENDS, huge_page_bytes, peak_memory_bytes
from runtime.system.memory_bandwidth import Memory
from runtime.system.progress import Stage

GREEDY = SamplingParams(temperature=0.0)


def machine() -> dict[str, Any]:
    """This machine: processor, cores that this process may use, Python, backend versions."""
    found = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    }
    for name in sorted({name for names in BACKENDS.values() for name in names}):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def measure(
    loaded: Loaded, prompt_tokens: int, new_tokens: int, repeat: int, stage: Stage
) -> dict[str, Any]:
    """Measure rounds of one prompt and one answer from an empty ring, after a warm-up round.

    Returns medians; the percentiles of the inter-token latency are over all rounds together. The
    memory bandwidth is measured after every round, because other virtual machines on the same host
    change it. Memory is that after the warm-up round, which does all that the others do.
    """
    rounds, bandwidths = [], []
    with stage("Measuring", repeat + 1) as advance:
        _round(loaded, prompt_tokens, new_tokens)
        peak, huge = peak_memory_bytes(), huge_page_bytes()
        memory = Memory(_threads(loaded))
        advance(1)
        for _ in range(repeat):
            rounds.append(_round(loaded, prompt_tokens, new_tokens))
            bandwidths.append(memory.read_bandwidth())
            advance(1)
    prefill, decode = median(one.ttft for one in rounds), median(one.decode for one in rounds)
    latencies = np.concatenate([one.latencies for one in rounds])  # seconds
    bytes_per_token = step_bytes(loaded.bundle.manifest.build, prompt_tokens + new_tokens // 2)
    shares = [
        (new_tokens - 1) * bytes_per_token / one.decode / bandwidth
        for one, bandwidth in zip(rounds, bandwidths, strict=True)
    ]
    return {
        **_setting(loaded),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "rounds": repeat,
        "load_s": loaded.seconds,
        "ttft_s": prefill,
        "prefill_tokens_per_s": prompt_tokens / prefill,
        "decode_tokens_per_s": (new_tokens - 1) / decode,
        "step_ms_median": 1e3 * float(np.median(latencies)),
        "step_ms_p95": 1e3 * float(np.percentile(latencies, 95)),
        "step_ms_p99": 1e3 * float(np.percentile(latencies, 99)),
        "host_share": median(one.host / one.decode for one in rounds),
        "bytes_per_token": bytes_per_token,
        "read_bandwidth_bytes_per_s": median(bandwidths),
        "bandwidth_share": median(shares),
        "peak_memory_bytes": peak,
        "huge_page_bytes": huge,
    }


def measure_batch(
    loaded: Loaded, prompt_tokens: int, new_tokens: int, repeat: int, stage: Stage
) -> dict[str, Any]:
    """Decode one sequence in each loaded row; returns medians, tokens per second of all rows."""
    manifest, session = loaded.bundle.manifest, loaded.session
    rows = session.batch
    seconds = []
    with stage("Measuring", repeat + 1) as advance:
        for _ in range(repeat + 1):
            seconds.append(_batch_round(session, manifest, rows, prompt_tokens, new_tokens))
            advance(1)
    prefill, decode = (median(each) for each in zip(*seconds[1:], strict=True))
    return {
        **_setting(loaded),
        "batch": rows,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "rounds": repeat,
        "prefill_tokens_per_s": rows * prompt_tokens / prefill,
        "decode_tokens_per_s": rows * (new_tokens - 1) / decode,
        "step_ms_mean": 1e3 * decode / (new_tokens - 1),
    }


def measure_positions(
    loaded: Loaded, positions: int, plot: Path | None, stage: Stage
) -> dict[str, Any]:
    """Generate `positions` tokens, one step each; returns latency and memory by position."""
    generator = loaded.generator
    generator.rewind(0)
    latency = np.empty(positions, np.float64)  # seconds
    resident = np.zeros(positions, np.int64)  # bytes
    logits = generator.feed(_prompt(generator.vocab_size, 1))
    steps = generator.generate(logits, GREEDY, max_new_tokens=positions)
    with stage("Generating", positions) as advance:
        for i in range(positions):
            began = perf_counter()
            if next(steps, None) is None:
                raise _ended(i, positions)
            latency[i] = perf_counter() - began
            resident[i] = resident_bytes()
            advance(1)
    full = max(generator.ring.full.values())
    first, last = latency[full : full + 1000], latency[-1000:]
    result = {
        **_setting(loaded),
        "positions": positions,
        "ring_full_at": full,
        "median_step_ms_after_full": 1e3 * float(np.median(first)) if first.size else None,
        "median_step_ms_at_end": 1e3 * float(np.median(last)),
        "resident_bytes_at_1000": int(resident[999]) if positions >= 1000 else None,
        "resident_bytes_at_end": int(resident[-1]),
    }
    if plot is not None:
        _draw(plot, latency, resident, result)
        result["plot"] = str(plot)
    return result


def to_text(result: dict[str, Any]) -> str:
    """One measurement per line, the machine first."""
    lines = [f"{name}: {value}" for name, value in result.pop("machine").items()]
    for name, value in result.items():
        lines.append(f"{name}: {value:,.3f}" if isinstance(value, float) else f"{name}: {value}")
    return "\n".join(lines)


def _setting(loaded: Loaded) -> dict[str, Any]:
    """The bundle that was measured, and the machine."""
    manifest = loaded.bundle.manifest
    return {
        "machine": machine(),
        "bundle": str(loaded.bundle.path),
        "model": f"{manifest.checkpoint['name']}, {manifest.precision} for {manifest.target}",
        "threads": _threads(loaded),
    }


def _threads(loaded: Loaded) -> int:
    return loaded.threads or len(os.sched_getaffinity(0))


def check_plot(path: Path) -> None:
    """Raise unless a plot can be drawn and written to `path`; called before measuring."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MistralcError(
            "--plot needs matplotlib, which is not installed: pip install 'mistralc[report]'."
        )
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UsageError(
            f"--plot is {path}; the name of a file in an existing directory is expected."
        )


def _ended(made: int, wanted: int) -> MistralcError:
    return MistralcError(
        f"The text ended after {made} of {wanted} tokens: this bundle has no room for more. Export "
        "it with a sliding --window, or request fewer tokens."
    )


def _prompt(vocab_size: int, count: int) -> list[int]:
    """Pseudo-random tokens, the same on every call."""
    bits = np.random.Generator(np.random.PCG64(0))
    ids: list[int] = bits.integers(0, vocab_size, count).tolist()
    return ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Seconds of one answer.

    `ttft` is the time to first token, `decode` that of all other tokens and `latencies` those
    between two tokens. `host` is the part of `decode` outside the backend: sampling, detokenizing
    and the loop.
    """

    ttft: float
    decode: float
    host: float
    latencies: NDArray[np.float64]


def _round(loaded: Loaded, prompt_tokens: int, new_tokens: int) -> Round:
    """Answer once as `generate` does: sample, detokenize, and check for the end."""
    generator, text = loaded.generator, loaded.tokenizer.stream()
    generator.rewind(0)
    sequence = generator.sequence
    session = sequence.session
    clocked = sequence.session = ClockedSession(session)
    try:
        began = perf_counter()
        logits = generator.feed(_prompt(generator.vocab_size, prompt_tokens))
        steps = generator.generate(logits, GREEDY, max_new_tokens=new_tokens)
        text.push(next(steps).token_id)
        clocked.seconds = 0.0
        times = [perf_counter()]
        for step in steps:
            text.push(step.token_id)
            times.append(perf_counter())
    finally:
        sequence.session = session
    if len(times) < new_tokens:
        raise _ended(len(times), new_tokens)
    decode = times[-1] - times[0]
    return Round(
        ttft=times[0] - began, decode=decode, host=decode - clocked.seconds,
        latencies=np.diff(times),
    )  # fmt: skip


def _batch_round(
    session: Session, manifest: Manifest, rows: int, prompt_tokens: int, new_tokens: int
) -> tuple[float, float]:
    """Seconds for the prompts and the answers of `rows` equal sequences, without sampling."""
    sequence = Sequence(session, make_ring(manifest.build, rows), rows)
    sequence.ring.check_room(prompt_tokens + new_tokens)
    prompt = np.array(_prompt(manifest.model.vocab_size, prompt_tokens))
    marks = [perf_counter()]
    for _ in sequence.feed(prompt):
        pass
    marks.append(perf_counter())
    for _ in range(new_tokens - 1):
        sequence.step(prompt[:1])
    marks.append(perf_counter())
    return marks[1] - marks[0], marks[2] - marks[1]


def resident_bytes() -> int:
    """This process's memory in RAM in bytes, mapped files included."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _draw(path: Path, latency: Any, resident: Any, result: dict[str, Any]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    bucket = max(1, len(latency) // 200)
    kept = len(latency) // bucket * bucket
    shaped = 1e3 * latency[:kept].reshape(-1, bucket)
    at = np.arange(shaped.shape[0]) * bucket
    figure, (top, bottom) = pyplot.subplots(2, 1, sharex=True, figsize=(9, 6))
    top.fill_between(at, *np.percentile(shaped, (5, 95), axis=1), alpha=0.3, label="5 to 95 %")
    top.plot(at, np.median(shaped, axis=1), label="median")
    top.axvline(result["ring_full_at"], linestyle=":", color="black", label="ring full")
    top.set(ylabel="inter-token latency (ms)", ylim=(0, None))
    top.legend(loc="lower right")
    bottom.plot(np.arange(len(resident)), resident / 1e6)
    room = (0, 1.1e-6 * resident.max())
    bottom.set(xlabel="position (tokens)", ylabel="resident memory (MB)", ylim=room)
    top.set_title(f"{result['machine']['processor']}, {result['machine']['cores']} cores")
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise MistralcError(f"The plot could not be written to {path} ({error}).") from error
    finally:
        pyplot.close(figure)
