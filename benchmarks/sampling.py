"""Measure the time of sampling one token, by sampling options.

    python -m benchmarks.sampling

Prints the machine and the median and 95th percentile in microseconds. Rows of logits are of two
kinds. `peaked` resembles a language model: the probability of the r-th likeliest token falls as
r^-1.5, in random order. `flat` is normal noise, where top-p keeps half the vocabulary: the worst
case.
"""

import os
import platform
import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from runtime.decoding.sampling import Sampler, SamplingParams

ROWS, ROUNDS, WARMUP = 16, 40, 16
CASES = {
    "one argmax, for comparison": None,
    "greedy": SamplingParams(temperature=0, seed=0),
    "greedy, repetition penalty, 2,000 tokens seen": SamplingParams(
        temperature=0, repetition_penalty=1.1, seed=0
    ),
    "temperature 0.8": SamplingParams(temperature=0.8, seed=0),
    "top-k 50": SamplingParams(temperature=0.8, top_k=50, seed=0),
    "top-p 0.95": SamplingParams(temperature=0.8, top_p=0.95, seed=0),
    "min-p 0.05": SamplingParams(temperature=0.8, min_p=0.05, seed=0),
    "top-k 50, top-p 0.95": SamplingParams(temperature=0.8, top_k=50, top_p=0.95, seed=0),
    "top-k 50, top-p 0.95, all penalties": SamplingParams(
        temperature=0.8,
        top_k=50,
        top_p=0.95,
        repetition_penalty=1.1,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        logit_bias={5: -100.0},
        seed=0,
    ),
    "top-k 50, top-p 0.95, logprobs 5": SamplingParams(
        temperature=0.8, top_k=50, top_p=0.95, logprobs=5, seed=0
    ),
}


def rows(kind: str, vocab_size: int) -> Iterator[NDArray[np.float32]]:
    random = np.random.default_rng(0)
    falling = -1.5 * np.log(np.arange(1, vocab_size + 1))
    for _ in range(ROWS):
        row = random.permutation(falling) if kind == "peaked" else random.normal(size=vocab_size)
        yield row.astype(np.float32)


def microseconds(params: SamplingParams | None, batch: list[NDArray[np.float32]]) -> list[float]:
    context = range(2000) if params is not None and params.repetition_penalty != 1 else ()
    sampler = Sampler(params or SamplingParams(), batch[0].size, context)
    taken = []
    for _ in range(ROUNDS):
        for row in batch:
            start = time.perf_counter_ns()
            if params is None:
                row.argmax()
            else:
                sampler.sample(row)
            taken.append((time.perf_counter_ns() - start) / 1000)
    return sorted(taken[WARMUP:])


def main() -> None:
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, NumPy {np.__version__}; "
        f"microseconds a token, median (p95) of {ROWS * ROUNDS - WARMUP} calls on {ROWS} rows"
    )
    for kind in ("peaked", "flat"):
        for vocab_size in (32_768, 49_152):
            print(f"\n{kind} rows, V={vocab_size:,}")
            batch = list(rows(kind, vocab_size))
            for name, params in CASES.items():
                taken = microseconds(params, batch)
                median, p95 = taken[len(taken) // 2], taken[len(taken) * 95 // 100]
                print(f"  {name:48}{median:8.1f}  ({p95:.1f})")


if __name__ == "__main__":
    main()
