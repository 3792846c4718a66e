"""Measure a server under many streaming clients and compare every answer with that of one client.

    python -m benchmarks.serve BUNDLE --clients 64 --seconds 120

Starts a server process and uses OpenAI's client. First every prompt is sent alone, greedily; then
all clients send requests for the given time, and every answer is compared. Prints the machine and
a Markdown table: throughput, latencies, different answers, errors, and memory over time.
"""

import argparse
import asyncio
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from openai import AsyncOpenAI

from runtime.measure.bench import machine
from tests.support.serving import Server, serving

TOPICS = ("a clock that ran backwards", "the sea in winter", "an honest merchant", "two sisters",
          "a bridge", "the last train", "snow in April", "a map without names", "an old dog",
          "the lighthouse", "a borrowed coat", "three questions", "a quiet street", "bread",
          "the garden behind the school", "a letter that came too late")  # fmt: skip
PROMPTS = tuple(f"{'Once more. ' * (i % 5)}Write a story about {t}." for i, t in enumerate(TOPICS))


@dataclass
class Measurements:
    """What clients measured. Times are in seconds."""

    answers: int = 0
    different: int = 0
    tokens: int = 0
    errors: list[str] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens per second of all clients together."""
        return self.tokens / self.seconds


async def ask(client: AsyncOpenAI, prompt: str, count: int, measured: Measurements) -> str:
    """Stream one answer and record its times in `measured`."""
    began = latest = time.perf_counter()
    text = ""
    stream = await client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": prompt}], max_tokens=count,
        temperature=0, stream=True, stream_options={"include_usage": True},
    )  # fmt: skip
    async for chunk in stream:
        now = time.perf_counter()
        if chunk.usage is not None:
            measured.tokens += chunk.usage.completion_tokens
        if not chunk.choices or not chunk.choices[0].delta.content:
            continue
        (measured.between if text else measured.ttft).append(now - (latest if text else began))
        text += chunk.choices[0].delta.content
        latest = now
    return text


async def alone(client: AsyncOpenAI, count: int) -> tuple[dict[str, str], Measurements]:
    """Answer every prompt, one at a time."""
    measured, began = Measurements(), time.perf_counter()
    answers = {prompt: await ask(client, prompt, count, measured) for prompt in PROMPTS}
    measured.seconds = time.perf_counter() - began
    return answers, measured


async def together(
    client: AsyncOpenAI, expected: dict[str, str], clients: int, seconds: float, count: int
) -> Measurements:
    """Run all clients at once; each starts its last request before `seconds` have passed."""
    measured, began = Measurements(), time.perf_counter()

    async def one(first: int) -> None:
        for i in itertools.count(first):
            if time.perf_counter() - began > seconds:
                return
            prompt = PROMPTS[i % len(PROMPTS)]
            try:
                text = await ask(client, prompt, count, measured)
            except Exception as error:
                measured.errors.append(repr(error))
                return
            measured.answers += 1
            measured.different += text != expected[prompt]

    await asyncio.gather(*(one(i) for i in range(clients)))
    measured.seconds = time.perf_counter() - began
    return measured


async def measure(server: Server, arguments: argparse.Namespace) -> dict[str, str]:
    """Run both phases and sample the server's memory during the second."""
    process = psutil.Process(server.process.pid)
    memory: list[int] = []

    async def watch() -> None:
        while True:
            memory.append(process.memory_info().rss)
            await asyncio.sleep(1)

    async with AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600
    ) as client:
        count = arguments.new_tokens
        await ask(client, "Warm up.", count, Measurements())
        expected, single = await alone(client, count)
        await together(client, expected, arguments.clients, 0, count)  # lets the ring grow
        watching = asyncio.create_task(watch())
        many = await together(client, expected, arguments.clients, arguments.seconds, count)
        watching.cancel()
    tenths = [statistics.median(part) / 1e6 for part in np.array_split(memory, 10)]
    return {
        "clients, rows": f"{arguments.clients}, {arguments.rows}",
        "seconds": f"{many.seconds:.0f}",
        "answers": f"{many.answers:,}",
        "different from one client": str(many.different),
        "errors": str(len(many.errors)) + (f": {many.errors[0]}" if many.errors else ""),
        "tokens/s, all clients": f"{many.rate:.1f}",
        "tokens/s, one client": f"{single.rate:.1f}",
        "ratio": f"{many.rate / single.rate:.2f}",
        "inter-token latency p50, p99": milliseconds(many.between),
        "the same, one client": milliseconds(single.between),
        "time to first token p50, p99": milliseconds(many.ttft),
        "the same, one client ": milliseconds(single.ttft),
        "resident memory, each tenth of the time, MB": ", ".join(f"{mb:,.0f}" for mb in tenths),
    }


def milliseconds(values: Sequence[float]) -> str:
    """The 50th and 99th percentile, as text."""
    ranked = sorted(values)
    at = [ranked[min(len(ranked) - 1, int(len(ranked) * q))] for q in (0.5, 0.99)]
    return " and ".join(f"{1000 * value:,.0f} ms" for value in at)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=48)
    arguments = parser.parse_args()
    with serving(
        arguments.bundle, "--rows", arguments.rows, "--threads", arguments.threads
    ) as server:
        figures = asyncio.run(measure(server, arguments))
    print(f"{arguments.bundle.name} on {json.dumps(machine())}\n")
    print("| figure | value |\n| --- | --- |")
    for name, value in figures.items():
        print(f"| {name.strip()} | {value} |")


if __name__ == "__main__":
    main()
