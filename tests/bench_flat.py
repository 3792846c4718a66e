"""Whether a step costs the same at 8 windows as at one, and whether memory grows on the way.

Not a test. `python -m tests.bench_flat BUNDLE [--steps 1000] [--times 8]` needs a bundle whose
layers all have a window W. Two sessions of it stand at positions W and 8 W and take one step each
in turn, so that whatever the machine does besides hits both alike.
"""

import argparse
import json
from pathlib import Path
from time import perf_counter

import numpy as np

from runtime.bench import machine, resident_bytes
from runtime.load import Loaded, load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--times", type=int, default=8)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    near, far = (load(arguments.bundle, threads=arguments.threads) for _ in range(2))
    window = max(near.bundle.manifest.model.layer_windows, key=lambda size: size or 10**9)
    if window is None:
        raise SystemExit(f"{arguments.bundle} has a layer without a window: it does grow.")
    bits = np.random.Generator(np.random.PCG64(0))
    ids = bits.integers(0, near.generator.vocab_size, arguments.times * window).tolist()
    for one in (near, far):  # the ring of both is full, and its pages have been touched
        one.generator.feed(ids[:window])
    before = resident_bytes()
    far.generator.feed(ids[window:])
    after = resident_bytes()
    seconds = np.array([[step(near), step(far)] for _ in range(arguments.steps)])
    first, last = 1e3 * np.median(seconds, axis=0)
    print(json.dumps(machine()))
    print(f"bundle: {arguments.bundle}, window {window}")
    print(f"median step from position {window:,}: {first:.3f} ms")
    print(f"median step from position {arguments.times * window:,}: {last:.3f} ms")
    print(f"ratio: {last / first:.4f}, medians of {arguments.steps} steps in turn")
    print(f"resident memory on the way there: {before:,} to {after:,} bytes")
    print(f"and after all steps: {resident_bytes():,} bytes")


def step(loaded: Loaded) -> float:
    """Seconds of one token."""
    began = perf_counter()
    loaded.generator.feed([1])
    return perf_counter() - began


if __name__ == "__main__":
    main()
