"""How fast a bundle is, and on what. Knows nothing about peers or correctness."""

import importlib.util
import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from graphs.errors import MistralcError, UsageError
from runtime.generator import Generator
from runtime.load import Loaded
from runtime.progress import Stage
from runtime.sampling import SamplingParams

BACKENDS = ("onnxruntime", "onnxruntime-gpu", "tensorrt-rtx-cu13", "tensorrt")
GREEDY = SamplingParams(temperature=0.0)


def machine() -> dict[str, Any]:
    """What this ran on: processor, cores this process may use, Python, backend."""
    found = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    }
    for name in BACKENDS:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def measure(
    loaded: Loaded, prompt_tokens: int, new_tokens: int, repeat: int, stage: Stage
) -> dict[str, Any]:
    """Rounds of one prompt and one answer from an empty ring; medians, after one warm-up."""
    rounds = []
    with stage("Measuring", repeat + 1) as advance:
        for _ in range(repeat + 1):
            rounds.append(_round(loaded.generator, prompt_tokens, new_tokens))
            advance(1)
    prefill, decode = zip(*rounds[1:], strict=True)
    return {
        "machine": machine(),
        "bundle": str(loaded.bundle.path),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "rounds": repeat,
        "load_s": loaded.seconds,
        "ttft_s": median(prefill),
        "prefill_tokens_per_s": prompt_tokens / median(prefill),
        "decode_tokens_per_s": (new_tokens - 1) / median(decode),
    }


def measure_positions(
    loaded: Loaded, positions: int, plot: Path | None, stage: Stage
) -> dict[str, Any]:
    """Generate `positions` tokens, one step each, and relate latency and memory to position."""
    generator = loaded.generator
    generator.rewind(0)
    latency = np.empty(positions, np.float64)  # seconds
    resident = np.zeros(positions, np.int64)  # bytes
    logits = generator.feed(_prompt(generator, 1))
    steps = generator.generate(logits, GREEDY, max_new_tokens=positions)
    with stage("Generating", positions) as advance:
        for i in range(positions):
            began = perf_counter()
            if next(steps, None) is None:
                raise _ended(i, positions)
            latency[i] = perf_counter() - began
            resident[i] = _resident()
            advance(1)
    full = max(generator.ring.full.values())
    first, last = latency[full : full + 1000], latency[-1000:]
    result = {
        "machine": machine(),
        "bundle": str(loaded.bundle.path),
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
    """One measurement a line, what it ran on first."""
    lines = [f"{name}: {value}" for name, value in result.pop("machine").items()]
    for name, value in result.items():
        lines.append(f"{name}: {value:,.3f}" if isinstance(value, float) else f"{name}: {value}")
    return "\n".join(lines)


def check_plot(path: Path) -> None:
    """Raise unless a plot can be drawn and written to `path`; before the measurement, not after."""
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
        f"The text ended at {made} tokens of {wanted}: this bundle has no room for more. Export "
        "it with --window to let it slide, or ask for fewer."
    )


def _prompt(generator: Generator, count: int) -> list[int]:
    """Pseudo-random tokens, the same every time."""
    bits = np.random.Generator(np.random.PCG64(0))
    ids: list[int] = bits.integers(0, generator.vocab_size, count).tolist()
    return ids


def _round(generator: Generator, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    generator.rewind(0)
    began = perf_counter()
    steps = generator.generate(
        generator.feed(_prompt(generator, prompt_tokens)), GREEDY, max_new_tokens=new_tokens
    )
    next(steps)
    first = perf_counter()
    made = 1 + sum(1 for _ in steps)
    if made < new_tokens:
        raise _ended(made, new_tokens)
    return first - began, perf_counter() - first


def _resident() -> int:
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
