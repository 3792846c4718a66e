"""Profile the operators of a `cpu` bundle in a decode step and in a prompt.

    python -m benchmarks.operators BUNDLE … [--prompt-tokens 512]

Prints the machine and, for one token after 128 and for a prompt, a Markdown table with the
milliseconds of each operator type by ONNX Runtime's profiler, and for matrix products the
operations per second. Profiling costs about a microsecond per node.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import onnxruntime as ort

from runtime.load import Loaded, load
from runtime.measure.bench import machine

SHORT, STEPS, PROMPTS = 128, 60, 4
SHOWN = 8  # operator types
PRODUCTS = ("MatMul", "FusedMatMul", "MatMulNBits", "MatMulIntegerToFloat", "QLinearMatMul")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    print(json.dumps(machine()))
    for bundle in arguments.bundles:
        for title, tokens in (("one token", 1), ("a prompt", arguments.prompt_tokens)):
            print(f"\n{bundle.name}, {title} of {tokens}, {arguments.threads} threads\n")
            events = profile(bundle, tokens, arguments.threads)
            print("\n".join(table(events, (STEPS if tokens == 1 else PROMPTS) // 2)))


def profile(bundle: Path, tokens: int, threads: int) -> list[dict[str, Any]]:
    """The profiler's events from the second half of the runs."""
    with TemporaryDirectory() as folder, profiled(Path(folder) / "trace"):
        loaded = load(bundle, threads=threads, check=False)
        run(loaded, tokens)
        session = loaded.session._session  # type: ignore[attr-defined]
        events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text())
    runs = [event for event in events if event.get("name") == "model_run"]
    begin = runs[-(len(runs) // 2)]["ts"]
    return [event for event in events if event.get("ts", 0) >= begin]


@contextmanager
def profiled(trace: Path) -> Iterator[None]:
    """Make sessions that are created inside write a trace."""

    class Options(ort.SessionOptions):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.enable_profiling, self.profile_file_prefix = True, str(trace)

    with patch("onnxruntime.SessionOptions", Options):
        yield


def run(loaded: Loaded, tokens: int) -> None:
    generator = loaded.generator
    ids = np.random.Generator(np.random.PCG64(0)).integers(0, generator.vocab_size, 4096).tolist()
    if tokens == 1:
        generator.feed(ids[:SHORT])
        for _ in range(STEPS):
            generator.feed(ids[:1])
    else:
        for _ in range(PROMPTS):
            generator.rewind(0)
            generator.feed(ids[:tokens])


def table(events: list[dict[str, Any]], times: int) -> list[str]:
    """Milliseconds by operator type, largest first; the events are of `times` repetitions."""
    total = sum(event["dur"] for event in events if event.get("name") == "model_run")
    spent, count, operations = Counter[str](), Counter[str](), Counter[str]()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            kind = event["args"]["op_name"]
            spent[kind] += event["dur"]
            count[kind] += 1
            operations[kind] += operation_count(kind, event["args"])
    lines = ["| operator | nodes | ms | share | GOP/s |", "| --- | ---: | ---: | ---: | ---: |"]
    for kind, microseconds in spent.most_common(SHOWN):
        speed = f"{operations[kind] / microseconds / 1e3:,.0f}" if operations[kind] else ""
        lines.append(
            f"| {kind} | {count[kind] / times:.0f} | {microseconds / times / 1e3:.2f} "
            f"| {microseconds / total:.0%} | {speed} |"
        )
    between = total - spent.total()
    return [*lines, f"| between | | {between / times / 1e3:.2f} | {between / total:.0%} | |"]


def operation_count(kind: str, facts: Mapping[str, Any]) -> int:
    """Multiplications and additions of one matrix product, from its shapes; 0 for other nodes."""
    if kind not in PRODUCTS:
        return 0
    (result,) = facts["output_type_shape"][0].values()
    (given,) = facts["input_type_shape"][0].values()
    return 2 * prod(map(int, result)) * int(given[-1])


if __name__ == "__main__":
    main()
