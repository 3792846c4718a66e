"""Compare mistralc with its peers: the same weights, prompt, token counts and threads.

    python -m benchmarks.peers.compare FOLDER [--peers-python PYTHON] [--rounds 5] [--write]

`benchmarks.peers.prepare` makes FOLDER; our bundles are in FOLDER/ours. Every engine runs in its
own process and is timed in turn, round after round, so other load on the machine affects all
equally. Perplexity is measured on the same windows for all. Prints the machine, the versions and a
Markdown table; --write replaces table and chart in docs/. A peer that fails to load is listed with
its error.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp
from pathlib import Path
from statistics import median
from typing import Any

from exporter.checkpoint.open import open_checkpoint
from exporter.checks.corpus import read_corpus, windows
from exporter.tokenizer.read import read_tokenizer
from graphs.manifest import read_manifest
from runtime.bundle.sizes import step_bytes
from runtime.measure.bench import machine
from runtime.system.memory_bandwidth import Memory
from tests.support.documents import DOCS, replace_between

ROOT = Path(__file__).resolve().parents[2]
CHART = DOCS / "peers.png"
MARKS = "<!-- measured by benchmarks/peers/compare.py -->", "<!-- end of the peers -->"
PROMPT, SHORT, NEW, LENGTH = 512, 128, 128, 512
WINDOW, LONG = 64, 400


@dataclass(slots=True, kw_only=True)
class Contestant:
    """One engine with one model. `bits` sorts the table; `note` describes the weights."""

    title: str
    engine: str
    model: str
    bits: int
    note: str = ""
    process: "subprocess.Popen[str] | None" = None
    version: str = ""
    error: str = ""
    prefill: list[float] = field(default_factory=list)  # seconds for PROMPT tokens
    decode: list[float] = field(
        default_factory=list
    )  # seconds for NEW - 1 steps after SHORT tokens
    nll: float | None = None

    def start(self, python: str, threads: int) -> None:
        """Load the engine; if that fails, set `error`."""
        worker = Path(__file__).with_name("worker.py")
        own = self.engine == "mistralc"
        self.process = subprocess.Popen(
            [sys.executable if own else python, worker, self.engine, self.model, str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
        first = self._read()
        self.version, self.error = first.get("version", ""), first.get("error", "")

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send one request; after an error the engine gets no further requests."""
        if self.error or self.process is None or self.process.stdin is None:
            return {}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self._read()
        self.error = answer.get("error", "")
        return {} if self.error else answer

    def _read(self) -> dict[str, Any]:
        if self.process is None or self.process.stdout is None:
            raise ValueError("the engine has not been started")
        line = self.process.stdout.readline()
        found: dict[str, Any] = json.loads(line) if line else {"error": "the process ended"}
        return found

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    @property
    def decode_rate(self) -> float:
        """Tokens per second, median of the rounds."""
        return (NEW - 1) / median(self.decode)

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second, median of the rounds."""
        return PROMPT / median(self.prefill)


def contestants(folder: Path) -> list[Contestant]:
    """All engines and models that FOLDER has files for."""
    own = [
        Contestant(title=f"mistralc {path.name}", engine="mistralc", model=str(path),
                   bits=8 if "int8" in path.name else 4 if "int4" in path.name else 32)
        for path in sorted((folder / "ours").iterdir())
    ]  # fmt: skip
    twice = "quantized a second time"
    llama = [
        Contestant(title=f"llama.cpp {kind}", engine="llama.cpp", bits=bits, note=note,
                   model=str(folder / "llama" / f"{kind}.gguf"))
        for kind, bits, note in (("Q4_1", 4, "the checkpoint itself"), ("Q4_0", 4, twice),
                                 ("Q8_0", 8, twice), ("F16", 16, ""))
    ]  # fmt: skip
    genai = [
        Contestant(title=f"onnxruntime-genai {kind}", engine="onnxruntime-genai", note=twice,
                   model=str(folder / f"genai-{kind}"), bits=int(kind[3]))
        for kind in ("int4", "int4-pruned", "int8", "int8-pruned")
    ]  # fmt: skip
    others = [
        Contestant(title="OpenVINO GenAI, from Q8_0", engine="openvino-genai", note=twice,
                   model=str(folder / "llama" / "Q8_0.gguf"), bits=8),
        Contestant(title="OpenVINO GenAI, from Q4_0", engine="openvino-genai", note=twice,
                   model=str(folder / "llama" / "Q4_0.gguf"), bits=4),
        Contestant(title="transformers bfloat16", engine="transformers", bits=16,
                   model=f"{folder / 'hf'}:bfloat16"),
        Contestant(title="transformers float32", engine="transformers", bits=32,
                   model=f"{folder / 'hf'}:float32"),
    ]  # fmt: skip
    found = [*own, *llama, *genai, *others]
    return [one for one in found if Path(one.model.partition(":")[0]).exists()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peers-python", default=sys.executable)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--write", action="store_true", help="replace table and chart in docs/")
    arguments = parser.parse_args()
    cut = evaluation(arguments.windows)
    found = contestants(arguments.folder)
    try:
        bandwidth = run(found, cut, arguments)
    finally:
        for one in found:
            one.stop()
    long = windowed(arguments, cut)
    lines = [*table(found, arguments, bandwidth), "", *long]
    print("\n".join(lines))
    if arguments.write:
        replace_between(DOCS / "benchmarks.md", *MARKS, "\n".join(lines))
        chart([one for one in found if one.decode])


def evaluation(count: int) -> list[list[int]]:
    """The first windows of the evaluation text."""
    tokenizer = read_tokenizer(open_checkpoint("smollm2").path).open()
    cut: list[list[int]] = windows(read_corpus((), tokenizer, "evaluation"), LENGTH, count).tolist()
    return cut


def run(
    found: Sequence[Contestant], cut: Sequence[Sequence[int]], arguments: argparse.Namespace
) -> float:
    """Load all, score each once, then time them in turn; the first round is a warm-up.

    Returns the median memory bandwidth in bytes per second, measured in every round.
    """
    for one in found:
        one.start(arguments.peers_python, arguments.threads)
        one.nll = one.ask(do="score", windows=cut).get("nll")
        print(f"{one.title}: {one.error or one.version}", file=sys.stderr, flush=True)
    memory, bandwidths = Memory(arguments.threads), []
    for number in range(arguments.rounds + 1):
        bandwidths.append(memory.read_bandwidth())
        for one in found:
            long = one.ask(do="time", prompt=cut[0], count=2)
            short = one.ask(do="time", prompt=cut[-1][:SHORT], count=NEW)
            if number and long and short:
                one.prefill.append(long["prefill"])
                one.decode.append(short["decode"])
        print(f"round {number} of {arguments.rounds}", file=sys.stderr, flush=True)
    return median(bandwidths[1:])


def windowed(arguments: argparse.Namespace, cut: Sequence[Sequence[int]]) -> list[str]:
    """Compare greedy tokens beyond a sliding window with those of transformers."""
    folder = arguments.folder
    cases = [
        Contestant(title="transformers", engine="transformers", bits=32,
                   model=f"{folder / f'hf-{WINDOW}'}:float32"),
        Contestant(title="mistralc", engine="mistralc", bits=32,
                   model=str(folder / f"ours-window-{WINDOW}")),
        Contestant(title="onnxruntime-genai", engine="onnxruntime-genai", bits=32,
                   model=str(folder / f"genai-window-{WINDOW}")),
        Contestant(title="llama.cpp F16", engine="llama.cpp", bits=16,
                   model=str(folder / f"llama-{WINDOW}.gguf")),
    ]  # fmt: skip
    answers: dict[str, tuple[list[int], str]] = {}
    for one in cases:
        if not Path(one.model.partition(":")[0]).exists():
            continue
        one.start(arguments.peers_python, arguments.threads)
        answer = one.ask(do="time", prompt=cut[0][:32], count=LONG - 32)
        answers[one.title] = (answer.get("tokens", []), one.error)
        one.stop()
    expected, _ = answers.pop("transformers")
    lines = [
        f"Beyond a window: float32, `sliding_window: {WINDOW}`, greedy, from 32 to {LONG} tokens, "
        f"beside transformers' {len(expected)} tokens:",
        "",
        "| | equal tokens | first difference |",
        "| --- | ---: | --- |",
    ]
    for title, (tokens, error) in answers.items():
        same = [a == b for a, b in zip(tokens, expected, strict=False)]
        first = error or ("none" if all(same) else f"token {same.index(False)}")
        lines.append(f"| {title} | {sum(same)} of {len(expected)} | {first[:150]} |")
    return lines


def table(
    found: Sequence[Contestant], arguments: argparse.Namespace, bandwidth: float
) -> list[str]:
    """The comparison in Markdown, by bits, fastest first."""
    facts = machine()
    versions = sorted({one.version for one in found if one.version})
    lines = [
        f"{facts['processor']}, {arguments.threads} threads, {', '.join(versions)}; medians of "
        f"{arguments.rounds} interleaved rounds. Memory is read at {bandwidth / 1e9:.1f} GB/s. "
        f"Decode: {NEW - 1} steps after {SHORT} tokens. Prefill: {PROMPT} tokens. Perplexity: "
        f"{arguments.windows} windows of {LENGTH} tokens.",
        "",
        "| | decode, tokens/s | prefill, tokens/s | perplexity | weights | of bandwidth |",
        "| --- | ---: | ---: | ---: | --- | ---: |",
    ]
    timed = [one for one in found if one.decode]
    for one in sorted(timed, key=lambda one: (one.bits, -one.decode_rate)):
        perplexity = "" if one.nll is None else f"{exp(one.nll):.2f}"
        share = f"{one.decode_rate * bytes_per_token(one) / bandwidth:.0%}" if own(one) else ""
        lines.append(
            f"| {one.title} | {one.decode_rate:.0f} | {one.prefill_rate:,.0f} | {perplexity} "
            f"| {one.note} | {share} |"
        )
    failed = [one for one in found if not one.decode]
    lines += [""] * bool(failed) + [f"{one.title} did not run: {one.error[:200]}" for one in failed]
    return lines


def own(one: Contestant) -> bool:
    return one.engine == "mistralc"


def bytes_per_token(one: Contestant) -> int:
    """Bytes that the middle one of the timed steps reads."""
    return step_bytes(read_manifest(Path(one.model)).build, SHORT + NEW // 2)


def chart(found: Sequence[Contestant]) -> None:
    """Plot decode and prefill rates side by side."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    ordered = sorted(found, key=lambda one: (-one.bits, one.decode_rate))
    colours: Mapping[bool, str] = {True: "tab:orange", False: "tab:gray"}
    figure, axes = pyplot.subplots(1, 2, sharey=True, figsize=(10, 0.35 * len(ordered) + 1))
    for axis, name in zip(axes, ("decode", "prefill"), strict=True):
        rates = [getattr(one, f"{name}_rate") for one in ordered]
        axis.barh([one.title for one in ordered], rates, color=[colours[own(o)] for o in ordered])
        axis.set(xlabel=f"{name}, tokens/s")
    figure.tight_layout()
    figure.savefig(CHART, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
