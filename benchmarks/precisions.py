"""What every precision costs SmolLM2, measured on the bundles themselves.

Not a test. `python -m benchmarks.precisions FOLDER` calibrates, exports and evaluates on ONNX
Runtime CPU, one row after another, and puts the table into docs/calibration.md. Tables of
calibration that are in FOLDER already are taken as they are. Half an hour on 2 cores.
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
from exporter.checks.quality_gate import Gate
from exporter.decoder.model import load_decoder
from exporter.export import ExportOptions, export
from exporter.quantization.policy import QuantizeOptions
from graphs.manifest import Manifest
from runtime.bundle.sizes import read_bytes
from runtime.load import load_session
from runtime.measure.bench import machine
from runtime.text.tokenizer import Tokenizer
from tests.support.documents import DOCS, replace_between

CHECKPOINT = "smollm2"
MARKS = "<!-- measured by benchmarks/precisions.py -->", "<!-- end -->"
LENGTH, SAMPLES = 512, 16  # tokens of a window; windows that calibrate


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to quantize: options of `mistralc calibrate`, if any, and of `mistralc export`."""

    name: str
    precision: str
    calibrate: tuple[str, ...] | None = None
    quantize: QuantizeOptions = field(default_factory=QuantizeOptions)


SYMMETRIC = QuantizeOptions(symmetric=True)
FLOAT_HEAD = QuantizeOptions(keep=("lm_head",))  # so that what is lost is lost by the layers
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
    parser.add_argument("folder", type=Path, help="for tables and bundles")
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--only", default="", help="a regular expression of rows")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    exporting.trace = cached_trace(exporting.trace)
    rows = [row for row in ROWS if re.search(arguments.only, row.name)]
    found = [measured(row, arguments.folder, arguments.windows) for row in rows]
    result = {"machine": machine(), "windows": arguments.windows, "length": LENGTH,
              "rows": [asdict(one) for one in found]}  # fmt: skip
    print(json.dumps(result, indent=2))
    if not arguments.only:
        replace_between(DOCS / "calibration.md", *MARKS, table(found, arguments.windows))


def measured(row: Row, folder: Path, count: int) -> BundleRow:
    """Calibrate, export and evaluate one row; the export's own gate does the evaluation."""
    table_path = calibrated(row, folder)
    bundle = folder / "bundle"
    everything = Gate(max_ppl_increase=1e9, windows=count)  # measured, whatever it loses
    manifest = export(CHECKPOINT, bundle, ExportOptions(
        precision=row.precision, quantize=row.quantize, calibration=table_path, gate=everything,
        force=True,
    ))  # fmt: skip
    found = (manifest.quantization or {}).get("quality") or plain(bundle, manifest, count)
    one = BundleRow(
        name=row.name, precision=row.precision, method=" ".join(row.calibrate or ()),
        file_bytes=manifest.file_bytes, read_bytes=read_bytes(manifest),
        **{name: found[name] for name in ("perplexity", "reference_perplexity", "kl", "top1")},
    )  # fmt: skip
    print(json.dumps(asdict(one)), file=sys.stderr, flush=True)
    return one


def plain(bundle: Path, manifest: Manifest, count: int) -> dict[str, Any]:
    """Evaluate a bundle that is not quantized, which no gate has seen."""
    corpus = read_corpus((), Tokenizer.load(bundle), "evaluation")
    session = load_session(bundle, manifest)
    decoder = load_decoder(manifest.model, open_checkpoint(CHECKPOINT).tensor)
    cut = windows(corpus, LENGTH, count)
    return evaluation.evaluate(session, manifest, cut, decoder).to_json()


def calibrated(row: Row, folder: Path) -> Path | None:
    """The row's table, made unless it is there."""
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
    """Trace once; every row gets a copy."""
    kept = cache(trace)
    return lambda spec, activation: kept(spec, activation).clone()


def cache_reference() -> None:
    """Run the reference once over every window, whatever the row: 100 MB of logits each."""
    run, kept = evaluation._reference_logits, {}

    def once(reference: Any, window: Any) -> Any:
        key = window.tobytes()
        if key not in kept:
            kept[key] = run(reference, window)
        return kept[key]

    evaluation._reference_logits = once


def table(rows: Sequence[BundleRow], count: int) -> str:
    """The Markdown between the marks."""
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
    cache_reference()
    main()
