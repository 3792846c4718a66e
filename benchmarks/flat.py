"""Compare the time of a step at 8 windows with that at one, and check that memory does not grow.

    python -m benchmarks.flat BUNDLE [--steps 1000] [--times 8]

Every layer of the bundle needs a window W. Two rows of one session are at positions W and 8 W and
take one step each in turn, so other load on the machine affects both equally. Prints the machine,
both medians, their ratio, and resident memory on the way.
"""

import argparse
import json
from pathlib import Path
from time import perf_counter

import numpy as np

from runtime.backends.session import Ids, Session
from runtime.decoding.ring import Ring
from runtime.load import load
from runtime.measure.bench import machine, resident_bytes

NEAR, FAR = 0, 1  # rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--times", type=int, default=8)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    loaded = load(arguments.bundle, rows=2, threads=arguments.threads)
    spec, times = loaded.bundle.manifest.model, arguments.times
    if not spec.slides:
        raise SystemExit(f"{arguments.bundle} has a layer without a window. Export with --window.")
    window = max(size for size in spec.windows if size is not None)
    session, ring = loaded.session, loaded.ring
    ring.grow_to(times * window)
    session.resize(ring.capacities)
    text = np.random.Generator(np.random.PCG64(0)).integers(0, spec.vocab_size, times * window)
    for row in (NEAR, FAR):  # now the ring is full and all its pages are resident
        feed(session, ring, text[:window], row)
    before = resident_bytes()
    feed(session, ring, text[window:], FAR)
    after = resident_bytes()
    seconds = np.empty((arguments.steps, 2))
    for turn in seconds:
        for row in (NEAR, FAR):
            began = perf_counter()
            feed(session, ring, text[:1], row)
            turn[row] = perf_counter() - began
    near, far = 1e3 * np.median(seconds, axis=0)
    print(json.dumps(machine()))
    print(f"bundle: {arguments.bundle}, window {window:,}, capacity {max(ring.full.values()):,}")
    print(f"median step from position {window:,}: {near:.3f} ms")
    print(f"median step from position {times * window:,}: {far:.3f} ms")
    print(f"ratio: {far / near:.4f}; {arguments.steps} steps each, in turn")
    print(f"resident memory between the positions: {before:,} to {after:,} bytes")
    print(f"and after all steps: {resident_bytes():,} bytes")


def feed(session: Session, ring: Ring, ids: Ids, row: int) -> None:
    """Write ids [n] into one row in pieces."""
    for count in ring.pieces(len(ids), row):
        here = ring.positions[row]
        positions = np.arange(here, here + count)[None]
        session.step(ids[None, :count], positions, np.array([[count - 1]]), row)
        ring.advance(count, row)
        ids = ids[count:]


if __name__ == "__main__":
    main()
