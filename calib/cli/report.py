"""The command `mistralc report`. Knows only the command line.

Invalid input is refused before the first bundle is loaded: bundles that tokenize the text
differently, a table that made none of them, a destination that cannot be written.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from calib.cli.text_windows import measure_text, read_windows
from calib.options import TextOptions
from graphs.errors import MistralcError, UsageError
from runtime.cli import options as common
from runtime.system.progress import stage_for

if TYPE_CHECKING:
    from calib.report.rows import BundleRow
    from calib.report.sections import Report
    from exporter.checks.corpus import Corpus
    from exporter.checks.evaluate import Evaluation
    from exporter.quantization.calibration_table import CalibrationTable
    from graphs.manifest import Manifest
    from runtime.backends.session import Ids

PAGE, TEXT = "index.html", "report.md"


def report(
    *,
    bundles: Annotated[
        list[Path], typer.Argument(metavar="BUNDLE...", help="Directories that export wrote.")
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIRECTORY", help="Where to write the report."),
    ] = Path("report"),
    table: Annotated[
        Path | None,
        typer.Option(metavar="TABLE", help="Show what calibration measured, by layer."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="CHECKPOINT",
                     help="Also measure this checkpoint, and each bundle's divergence from it."),
    ] = None,
    text_options: TextOptions,
    threads: common.Threads = None,
    no_check: common.NoCheck = False,
    require_signature: common.RequireSignature = None,
    as_json: common.Json = False,
    quiet: common.Quiet = False,
) -> None:  # fmt: skip
    """Compare bundles: size, quality and calibration, as an HTML page and as Markdown."""
    from calib.report.figures import require_matplotlib
    from calib.report.rows import with_distinct_names
    from runtime.bundle.open import open_bundle
    from runtime.load import load

    require_matplotlib()
    _make_directory(output)
    stage = stage_for(quiet=quiet or as_json)
    with stage("Checking the bundles", None):
        opened = [open_bundle(path, require_signature=require_signature) for path in bundles]
    manifests = [bundle.manifest for bundle in opened]
    calibration = None if table is None else _read_table(table, manifests)
    corpus, windows = read_windows(bundles, manifests, text_options)
    rows = []
    for bundle in opened:
        loaded = load(bundle, threads=threads, check=not no_check, stage=stage)
        title = f"Measuring {bundle.path.name}"
        found = measure_text(loaded, windows, against, stage, title)
        rows.append(_row(bundle.manifest, found))
    measured = with_distinct_names(rows, [bundle.name for bundle in bundles])
    origin = _text_origin(corpus, windows) | _origin(manifests, against)
    heading = _write_report(output, _report_of(measured, origin, calibration))
    if as_json:
        print(json.dumps({"page": str(output / PAGE), "text": str(output / TEXT),
                          "measured_on": origin,
                          "measured": [asdict(row) for row in measured]}))  # fmt: skip
        return
    print(heading)
    print(f"\nThe full report: {output / PAGE} and {output / TEXT}.")


def _make_directory(output: Path) -> None:
    """Create the report's directory; nothing in it is changed yet."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--output is {output}, which cannot be made a directory ({error}); expected a "
            "directory for the report. Choose another name."
        ) from error


def _read_table(path: Path, manifests: list["Manifest"]) -> "CalibrationTable":
    """Read the table. Raises UsageError if none of the bundles was made with it."""
    from exporter.quantization.calibration_table import CalibrationTable

    table = CalibrationTable.read(path)
    used = {(manifest.quantization or {}).get("calibration") for manifest in manifests}
    if table.fingerprint not in used:
        raise UsageError(
            f"--table is {path} ({table.precision} by {table.method}), and none of the bundles was "
            "made with it. Add the bundle that was, or omit --table."
        )
    return table


def _row(manifest: "Manifest", found: "Evaluation") -> "BundleRow":
    from calib.report.rows import BundleRow, bundle_name, method_name
    from runtime.bundle.sizes import read_bytes

    return BundleRow(
        name=bundle_name(manifest),
        precision=manifest.precision,
        method=method_name(manifest),
        file_bytes=manifest.file_bytes,
        read_bytes=read_bytes(manifest.build),
        perplexity=found.perplexity,
        reference_perplexity=found.reference_perplexity,
        kl=found.kl,
        top1=found.top1,
    )


def _text_origin(corpus: "Corpus", windows: "Ids") -> dict[str, str]:
    count, length = windows.shape
    return {
        "text": corpus.source,
        "windows": f"{count:,} of {length:,} tokens, each from an empty ring",
        "fingerprint of the text": corpus.fingerprint,
    }


def _origin(manifests: list["Manifest"], against: str | None) -> dict[str, str]:
    """Describe the checkpoint, this machine and the versions involved."""
    from runtime.measure.bench import machine

    here = machine()
    processor, cores = here.pop("processor"), here.pop("cores")
    found = {
        "checkpoint": _distinct(f"{m.checkpoint['name']} ({m.checkpoint['format']})"
                                for m in manifests),
        "machine": f"{processor}, {cores} cores",
        "versions here": _versions(here),
        "versions that exported": _distinct(_versions(m.versions) for m in manifests),
    }  # fmt: skip
    if against is not None:
        found["reference"] = "the checkpoint in PyTorch, float32"
    return found


def _report_of(
    measured: tuple["BundleRow", ...], origin: dict[str, str], table: "CalibrationTable | None"
) -> "Report":
    from calib.report.sections import Report

    if table is None:
        return Report(measured=measured, origin=origin)
    return Report(measured=measured, origin=origin, calibration=_calibration_origin(table),
                  facts=table.facts)  # fmt: skip


def _calibration_origin(table: "CalibrationTable") -> dict[str, str]:
    data = dict(table.data)
    source = data.pop("source", "")
    fingerprint = data.pop("fingerprint", "")
    rest = ", ".join(f"{name} {value}" for name, value in data.items())
    return {
        "calibration": f"{table.precision} by {table.method}, {len(table.schemes)} linears",
        "calibration, text": f"{source} ({rest})" if rest else str(source),
        "calibration, fingerprint of the text": str(fingerprint),
        "calibration, versions": _versions(table.versions),
    }


def _versions(versions: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def _distinct(values: Iterable[str]) -> str:
    """Join the distinct values, in order."""
    return "; ".join(dict.fromkeys(values))


def _write_report(output: Path, report: "Report") -> str:
    """Write the page and the Markdown; returns the table of bundles as Markdown."""
    from calib.report.page import to_html
    from calib.report.sections import build_sections, grid_lines, to_markdown

    sections = build_sections(report)
    _write(output / PAGE, to_html(sections))
    _write(output / TEXT, to_markdown(sections))
    return "" if sections[0].grid is None else "\n".join(grid_lines(sections[0].grid))


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise MistralcError(
            f"The report could not be written to {path} ({error}). Make the directory writable, or "
            "choose another with --output."
        ) from error
