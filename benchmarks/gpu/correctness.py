"""Compare a bundle with the PyTorch decoder, far beyond its window, for every number of rows.

    python -m benchmarks.gpu.correctness SHAPES --variant shipped --weights DIR --device cuda

Makes the weights first (`fill.py`), loads the bundle once, and prints one line of JSON: whether
decoding is captured, the largest difference of the logits over four turns of every ring (in chunks,
in single steps, and mixed), and whether golden tokens are the same with one row and with two.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.fill import filled
from benchmarks.gpu.variants import variant_build
from exporter.checks import golden, verify
from exporter.checks.reference_pass import Logits, case_texts
from exporter.checks.texts import Case
from exporter.decoder.model import Decoder, logits_at
from graphs.build import Build
from graphs.errors import MistralcError
from graphs.manifest import read_manifest
from runtime.backends.onnxruntime_cuda import CudaOrtSession
from runtime.decoding.golden import replay
from runtime.load import make_ring

TURNS = 4  # of every ring
ROWS = (1, 2)
GOLDEN = 12  # tokens of a golden text


def main() -> int:
    made = filled(str(__doc__).splitlines()[0])
    found = check(made.bundle, made.variant, made.device)
    print(json.dumps({**made.record, **found}))
    return 0 if found["passed"] else 1


def check(bundle: Path, variant: str, device: torch.device) -> dict[str, Any]:
    """Compare a filled bundle of one variant with the decoder on `device`."""
    manifest = read_manifest(bundle)
    build = variant_build(manifest.build, variant)
    reference = verify.bundle_reference(bundle, manifest, device)
    texts = golden_texts(reference, build)
    cases = ring_cases(build)
    began = perf_counter()
    with ExitStack() as opened:
        first = CudaOrtSession(bundle / "model.onnx", build.contract, build.target, batch=ROWS[0])
        opened.enter_context(first)
        loaded = perf_counter() - began
        rows: dict[str, Any] = {}
        expected = list(expected_logits(reference, build, cases))
        for count in ROWS:
            session = first if count == ROWS[0] else first.with_rows(count)
            opened.enter_context(session)
            rows[str(count)] = _of_rows(session, build, cases, expected, texts)
    passed = first.captured and all(row["passed"] for row in rows.values())
    known = sum(len(text["expected"]) for text in texts)
    return {"passed": passed, "captured": first.captured, "load_s": round(loaded, 2),
            "golden_tokens": known, "rows": rows}  # fmt: skip


def _of_rows(
    session: CudaOrtSession,
    build: Build,
    cases: list[Case],
    expected: list[Logits],
    texts: list[Mapping[str, Any]],
) -> dict[str, Any]:
    """The agreement of a session over all cases, and of its golden tokens."""
    agreements = verify.compare(session, build, cases, expected)
    same: bool | str = True  # or how the tokens differ
    try:
        replay(session, make_ring(build), texts, build.target.name)
    except MistralcError as error:
        same = str(error)
    return {
        "passed": same is True and all(one.passed for one in agreements),
        "golden": same,
        "cases": {one.case: {name: value for name, value in asdict(one).items()
                             if name in ("tokens", "max_rel", "kl", "top1")}
                  for one in agreements},
    }  # fmt: skip


def expected_logits(reference: Decoder, build: Build, cases: list[Case]) -> Iterator[Logits]:
    """The decoder's logits [T, V] for each case, one case at a time."""
    for ids, rows in case_texts(build, cases):
        yield logits_at(reference, ids[0], rows).numpy()


def ring_cases(build: Build) -> list[Case]:
    """One text of four turns of the largest ring, or as long as the context, in three ways."""
    spec, chunk = build.spec, build.ring.chunk
    count = TURNS * max(build.contract.capacities.values()) + 5
    if not spec.slides:
        count = min(count, build.ring.context)
    around = (chunk, 1, 1, 1, chunk - 1, 1, 5)
    mixed = around * (count // sum(around))
    mixed += (1,) * (count - sum(mixed))
    return [
        Case(name="chunks", turns=(count,)),
        Case(name="single steps", turns=(1,) * count),
        Case(name="mixed", turns=mixed),
    ]


def golden_texts(reference: Decoder, build: Build) -> list[Mapping[str, Any]]:
    """A short random text, and the tokens that the decoder clearly prefers in it."""
    ids = np.random.default_rng(1).integers(0, build.spec.vocab_size, GOLDEN)
    logits = logits_at(reference, torch.from_numpy(ids)[None], torch.arange(GOLDEN))
    lead = golden.margin(build.activation, rounded=build.rounds_inputs)
    return list(golden.golden([ids.tolist()], logits, lead))


if __name__ == "__main__":
    sys.exit(main())
