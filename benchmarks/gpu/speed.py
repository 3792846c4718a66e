"""Measure a bundle that `shapes.py` wrote: decoding at several positions, and a prompt.

    python -m benchmarks.gpu.speed SHAPES --variant shipped --weights DIR --device cuda

Makes the weights first (`fill.py`), loads the bundle once for all numbers of rows, and prints one
line of JSON.
"""

import json

from benchmarks.gpu.fill import filled
from benchmarks.gpu.measure import measure
from benchmarks.gpu.variants import variant_build
from graphs.manifest import read_manifest

ROWS = (1, 4)


def main() -> None:
    made = filled(str(__doc__).splitlines()[0])
    build = variant_build(read_manifest(made.bundle).build, made.variant)
    rows = [count for count in ROWS if count <= build.ring.max_batch]
    print(json.dumps({**made.record, **measure(made.bundle, build, rows)}))


if __name__ == "__main__":
    main()
