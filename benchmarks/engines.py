"""What a decoded token reads and writes in an engine, before and after rings are read in place.

    python -m benchmarks.engines [--layers 2 4] [--precision fp16 …] [--write]

Builds engines of Mistral-7B's width, which needs no GPU, in the form `folded` and in the form
`in_place` (`graphs/attention_form.py`), and takes the bytes from the audit of each. Two depths give
the bytes of a layer, and with them those of all 32. Results stay in FOLDER/results.json. With
--write, the table and the chart in docs/ are replaced.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from time import perf_counter
from typing import Any

import torch

from benchmarks.memory import PeakMemory
from exporter.checkpoint.open import open_checkpoint
from exporter.export import export
from exporter.options import ExportOptions
from exporter.quantization.calibration_table import CalibrationTable
from graphs.gpu_catalogue import GPUS
from graphs.precisions import PRECISIONS
from graphs.quant_scheme import default_scheme, groups
from graphs.targets import TARGETS
from tests.support.documents import DOCS, replace_between

TARGET, LAYERS = "rtx", 32
FORMS = ("folded", "in_place")
PARTS = ("weights", "cache", "activations", "moved")
MARKS = "<!-- measured by benchmarks/engines.py -->", "<!-- end of the engines -->"
CHART = DOCS / "engines.png"
BOUND_GPUS = ("rtx4090", "rtx5090")

Result = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/bench-engines"))
    parser.add_argument("--layers", nargs=2, type=int, default=(2, 4), metavar="N")
    parser.add_argument("--precision", nargs="+", default=list(TARGETS[TARGET].activations))
    parser.add_argument("--write", action="store_true", help="replace table and chart in docs/")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    file = arguments.folder / "results.json"
    found: dict[str, Result] = json.loads(file.read_text()) if file.exists() else {}
    for layers in arguments.layers:
        checkpoint = make_checkpoint(arguments.folder, layers)
        for precision in arguments.precision:
            for form in FORMS:
                name = f"{precision} {form} {layers}"
                if name not in found:
                    found[name] = measured(checkpoint, precision, form)
                    file.write_text(json.dumps(found, indent=2))
                print(name, json.dumps(found[name]), flush=True)
    rows = [
        extrapolated(found, precision, form, arguments.layers)
        for precision in arguments.precision
        for form in FORMS
    ]
    print(to_markdown(rows))
    if arguments.write:
        replace_between(DOCS / "benchmarks.md", *MARKS, to_markdown(rows))
        chart(rows)


def make_checkpoint(folder: Path, layers: int) -> Path:
    """Write a checkpoint of Mistral-7B's width with this many layers, once."""
    path = folder / f"checkpoint-{layers}"
    if not (path / "config.json").exists():
        command = [sys.executable, "-m", "tests.support.make_checkpoint", path, "--preset",
                   "mistral-7b-v0.1", "--dtype", "bf16", "--layers", str(layers)]  # fmt: skip
        subprocess.run([str(part) for part in command], check=True)
    return path


def measured(checkpoint: Path, precision: str, form: str) -> Result:
    """Build one engine; returns its audit in short, with the builder's memory and seconds."""
    bundle = checkpoint.parent / "bundle"
    table = write_table(checkpoint, precision)
    options = ExportOptions(
        target=TARGET, precision=precision, calibration=table, allow_faults=True, force=True
    )
    with form_of(form), PeakMemory() as memory:
        began = perf_counter()
        manifest = export(str(checkpoint), bundle, options)
        seconds = perf_counter() - began
    rmtree(bundle)
    engine = manifest.engine or {}
    kept = ("plan_bytes", "weight_bytes", "decode", "prompt", "faults", "tensorrt_version")
    return {**{name: engine[name] for name in kept}, "seconds": seconds,
            "builder_bytes": memory.children}  # fmt: skip


@contextmanager
def form_of(form: str) -> Iterator[None]:
    """Have the target decide on this form, as it does for long rings if it is `folded`."""
    target, table = TARGETS[TARGET], TARGETS
    slots = target.max_in_place_slots if form == "in_place" else 0
    table[TARGET] = replace(target, max_in_place_slots=slots)  # type: ignore[index]
    try:
        yield
    finally:
        table[TARGET] = target  # type: ignore[index]


def write_table(checkpoint: Path, precision: str) -> Path | None:
    """A calibration table with one range for every input: bytes do not depend on the numbers."""
    if not PRECISIONS[precision].needs_calibration:
        return None
    opened = open_checkpoint(checkpoint)
    folder = checkpoint.parent / f"{checkpoint.name}-{precision}"
    folder.mkdir(exist_ok=True)
    linears = [name for group in groups(opened.spec) for name in group.readers]
    CalibrationTable(
        precision=precision, method="one range for every input",
        checkpoint=opened.fingerprint(), data={}, versions={},
        schemes=dict.fromkeys(linears, default_scheme(precision, block=None)),
        tensors={f"{one.name}.input_scale": torch.tensor(0.05) for one in groups(opened.spec)},
    ).write(folder)  # fmt: skip
    return folder


def extrapolated(
    found: Mapping[str, Result], precision: str, form: str, layers: tuple[int, int]
) -> Result:
    """The bytes of all 32 layers, from those of two depths."""
    few, many = (found[f"{precision} {form} {count}"] for count in layers)

    def grow(small: int, large: int) -> int:
        return large + (large - small) * (LAYERS - layers[1]) // (layers[1] - layers[0])

    decode = {part: grow(few["decode"][part], many["decode"][part]) for part in (*PARTS, "kernels")}
    return {
        "precision": precision, "form": form, **decode,
        "total": sum(decode[part] for part in PARTS),
        "ratio": many["plan_bytes"] / many["weight_bytes"],
        "builder_bytes": many["builder_bytes"], "faults": many["faults"],
        "layers": layers[1], "tensorrt": many["tensorrt_version"],
    }  # fmt: skip


def to_markdown(rows: list[Result]) -> str:
    """A row per precision and form."""
    gpus = [GPUS[name] for name in BOUND_GPUS]
    titles = ("precision", "form", "kernels", *(f"{part}, MB" for part in PARTS), "in all, MB",
              *(f"{gpu.name}, tokens/s at most" for gpu in gpus), "plan / weights",
              "builder, GB")  # fmt: skip
    lines = [
        f"TensorRT-RTX {rows[0]['tensorrt']}, {LAYERS} layers from the lists of two "
        f"depths; plan and builder of {rows[0]['layers']} layers.",
        "",
        "| " + " | ".join(titles) + " |",
        "| --- | --- |" + " ---: |" * (len(titles) - 2),
    ]
    for row in rows:
        bytes_ = [f"{row[part] / 1e6:,.1f}" for part in (*PARTS, "total")]
        bounds = [f"{gpu.bandwidth_bytes_per_s / row['total']:,.0f}" for gpu in gpus]
        cells = [row["precision"], row["form"], f"{row['kernels']:,}", *bytes_, *bounds,
                 f"{row['ratio']:.4f}", f"{row['builder_bytes'] / 1e9:.2f}"]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def chart(rows: list[Result]) -> None:
    """Stacked bars: what each form of each precision reads and writes."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5))
    labels = [f"{row['precision']}\n{row['form'].replace('_', ' ')}" for row in rows]
    bottom = [0.0] * len(rows)
    for part in PARTS:
        heights = [row[part] / 1e9 for row in rows]
        axes.bar(labels, heights, bottom=bottom, label=part)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set_ylabel("GB read and written per token")
    axes.set_title(
        "Mistral-7B's shapes, ring of 4,608 slots: an engine's traffic per decoded token"
    )
    axes.tick_params(axis="x", labelsize=7)
    axes.legend()
    figure.tight_layout()
    figure.savefig(CHART, dpi=110)


if __name__ == "__main__":
    main()
