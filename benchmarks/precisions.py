"""Measure the loss of every precision on SmolLM2, on exported bundles.

    python -m benchmarks.precisions FOLDER

Calibrates, exports and evaluates every row on ONNX Runtime CPU. Prints the machine and all figures
as JSON, and writes the table, with versions, into docs/calibration.md. Calibration tables that are
already in FOLDER are reused. Takes half an hour on 2 cores.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from calib.report.rows import BundleRow
from exporter import export as exporting
from exporter.checkpoint.open import open_checkpoint
from exporter.checks import evaluate as evaluation
from exporter.checks.corpus import read_corpus, windows
from exporter.decoder.load import load_decoder
from exporter.export import export
from exporter.options import ExportOptions, GateOptions, QuantizeOptions
from graphs.manifest import Manifest
from runtime.bundle.sizes import read_bytes
from runtime.load import load_session
from runtime.measure.bench import machine
from runtime.text.tokenizer import Tokenizer
from tests.support.documents import DOCS, replace_between

CHECKPOINT = "smollm2"
MARKS = "<!-- measured by benchmarks/precisions.py -->", "<!-- end -->"
LENGTH, SAMPLES = 512, 16  # tokens per window; windows for calibration


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row: options of `mistralc calibrate`, if any, and of `mistralc export`."""

    name: str
    precision: str
    calibrate: tuple[str, ...] | None = None
    quantize: QuantizeOptions = field(default_factory=QuantizeOptions)


SYMMETRIC = QuantizeOptions(symmetric=True)
FLOAT_HEAD = QuantizeOptions(keep=("lm_head",))  # so that only the layers lose accuracy
ROWS = (
    Row(name="fp32", precision="fp32"),
    Row(name="int8wo, nearest, block 32", precision="int8wo"),
    Row(name="int4wo, GGUF's blocks as they are", precision="int4wo"),
    *(
        row
        for block in ("32", "128")
        for row in (
            Row(name=f"int4wo symmetric, nearest, block {block}", precision="int4wo",
                quantize=replace(SYMMETRIC, block=int(block))),
            *(Row(name=f"int4wo symmetric, {method}, block {block}", precision="int4wo",
                  calibrate=("--method", method, "--block", block))
              for method in ("awq", "gptq", "awq+gptq")),
        )
    ),
    Row(name="int8, SmoothQuant", precision="int8", calibrate=("--method", "smoothquant"),
        quantize=FLOAT_HEAD),
    Row(name="int8, SmoothQuant and GPTQ", precision="int8",
        calibrate=("--method", "smoothquant+gptq"), quantize=FLOAT_HEAD),
    Row(name="int8, the same, at most a tenth of the linears kept as int8wo", precision="int8",
        calibrate=("--method", "smoothquant+gptq", "--keep-share", "0.1"), quantize=FLOAT_HEAD),
    Row(name="fp8, SmoothQuant and GPTQ", precision="fp8",
        calibrate=("--method", "smoothquant+gptq"), quantize=FLOAT_HEAD),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder for calibration tables and bundles")
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--only", default="", help="regular expression; measure matching rows only")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    cache_reference()
    trace = cached_trace(exporting.trace)  # type: ignore[attr-defined]
    exporting.trace = trace  # type: ignore[attr-defined]
    rows = [row for row in ROWS if re.search(arguments.only, row.name)]
    found = [measure(row, arguments.folder, arguments.windows) for row in rows]
    result = {"machine": machine(), "windows": arguments.windows, "length": LENGTH,
              "rows": [asdict(one) for one in found]}  # fmt: skip
    print(json.dumps(result, indent=2))
    if not arguments.only:
        replace_between(DOCS / "calibration.md", *MARKS, table(found, arguments.windows))


def measure(row: Row, folder: Path, count: int) -> BundleRow:
    """Calibrate, export and evaluate one row on `count` windows."""
    table_path = calibrated(row, folder)
    bundle = folder / "bundle"
    no_limit = GateOptions(max_ppl_increase=1e9)  # publish whatever the loss
    manifest = export(CHECKPOINT, bundle, ExportOptions(
        precision=row.precision, quantize=row.quantize, calibration=table_path, gate=no_limit,
        force=True,
    ))  # fmt: skip
    found = evaluate(bundle, manifest, count)
    one = BundleRow(
        name=row.name, precision=row.precision, method=" ".join(row.calibrate or ()),
        file_bytes=manifest.file_bytes, read_bytes=read_bytes(manifest.build),
        **{name: found[name] for name in ("perplexity", "reference_perplexity", "kl", "top1")},
    )  # fmt: skip
    print(json.dumps(asdict(one)), file=sys.stderr, flush=True)
    return one


def evaluate(bundle: Path, manifest: Manifest, count: int) -> dict[str, Any]:
    """Perplexity of a bundle and of the checkpoint, and their divergence, over `count` windows."""
    corpus = read_corpus((), Tokenizer.load(bundle), "evaluation")
    session = load_session(bundle, manifest.build, manifest.files)
    decoder = load_decoder(manifest.model, open_checkpoint(CHECKPOINT).tensor)
    cut = windows(corpus, LENGTH, count)
    return evaluation.evaluate(session, manifest.build, cut, decoder).to_json()


def calibrated(row: Row, folder: Path) -> Path | None:
    """The calibration table of a row; calibrates unless it exists already."""
    if row.calibrate is None:
        return None
    words = [row.precision, *row.calibrate, "--samples", str(SAMPLES)]
    path = folder / re.sub(r"[^a-z0-9.+]+", "-", " ".join(words)).strip("-")
    if not path.exists():
        command = ["calibrate", CHECKPOINT, "--output", str(path), "--precision", *words]
        root = DOCS.parent
        subprocess.run([sys.executable, "-m", "mistralc", *command], check=True, cwd=root,
                       stdout=sys.stderr)  # fmt: skip
    return path


def cached_trace(trace: Any) -> Any:
    """Trace once and give every row a copy."""
    kept = cache(trace)
    return lambda spec, activation: kept(spec, activation).clone()


def cache_reference() -> None:
    """Run the reference once per window for all rows; 100 MB of logits per window."""
    run, kept = evaluation._reference_logits, {}

    def once(reference: Any, window: Any) -> Any:
        key = window.tobytes()
        if key not in kept:
            kept[key] = run(reference, window)
        return kept[key]

    evaluation._reference_logits = once


def table(rows: Sequence[BundleRow], count: int) -> str:
    """The Markdown table between the marks of the document."""
    facts = machine()
    uses_samples = any(row.method for row in rows)
    calibrated = f"Calibrated on {SAMPLES} windows of {LENGTH} tokens. " if uses_samples else ""
    lines = [
        f"{calibrated}Evaluated on {count} windows of {LENGTH} tokens, whose "
        f"perplexity in float32 is {rows[0].perplexity:.3f}; onnxruntime "
        f"{facts['onnxruntime']}, torch {torch.__version__.split('+')[0]}, Python "
        f"{facts['python']}.",
        "",
        "| | bundle, MB | read per token, MB | perplexity | change | KL, nats | top-1 agreement |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {one.name} | {one.file_bytes / 1e6:.0f} | {one.read_bytes / 1e6:.0f} "
        f"| {one.perplexity:.3f} | {one.change or 0:+.2%} | {one.kl or 0:.4f} "
        f"| {one.top1 or 0:.1%} |"
        for one in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
