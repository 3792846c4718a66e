"""Measure a bundle that `shapes.py` wrote: decoding at several positions, and a prompt.

    python -m benchmarks.gpu.speed SHAPES --variant shipped --weights DIR --device cuda

Makes the weights first (`fill.py`), loads the bundle once for all numbers of rows, and prints one
line of JSON.
"""

import argparse
import json
from pathlib import Path
from time import perf_counter

from benchmarks.gpu.fill import fill
from benchmarks.gpu.measure import measure
from benchmarks.gpu.variants import SHIPPED, VARIANTS, variant_build
from exporter.decoder.devices import DEVICES, reference_device
from graphs.manifest import read_manifest

ROWS = (1, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", type=Path)
    parser.add_argument("--variant", choices=VARIANTS, default=SHIPPED)
    parser.add_argument("--weights", type=Path, required=True, help="where to make the bundle")
    parser.add_argument("--device", choices=DEVICES, default="cuda")
    given = parser.parse_args()
    began = perf_counter()
    bundle = fill(given.shapes, given.variant, given.weights / given.shapes.name,
                  reference_device(given.device))  # fmt: skip
    filled = perf_counter() - began
    manifest = read_manifest(bundle)
    build = variant_build(manifest.build, given.variant)
    rows = [count for count in ROWS if count <= build.ring.max_batch]
    print(json.dumps({"bundle": given.shapes.name, "variant": given.variant,
                      "fill_s": round(filled, 2), **measure(bundle, build, rows)}))  # fmt: skip


if __name__ == "__main__":
    main()
