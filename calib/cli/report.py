"""The command `mistralc report`. Knows only the command line.

What can be refused is refused before the first bundle is loaded: bundles that do not read the same
text, a table that made none of them, a place that cannot be written.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphs.errors import MistralcError, UsageError
from runtime.cli import options
from runtime.system.progress import Stage, stage_for

if TYPE_CHECKING:
    from calib.report.rows import Measured
    from exporter.quantization.calibration_table import CalibrationTable
    from graphs.manifest import Manifest
    from runtime.backends.session import Ids
    from runtime.bundle.open import Bundle

LENGTH = 512  # tokens of a window, as for eval
PAGE, TEXT = "index.html", "report.md"


def report(
    *,
    bundles: Annotated[
        list[Path], typer.Argument(metavar="BUNDLE...", help="Directories that export wrote.")
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIRECTORY", help="Where the report is written."),
    ] = Path("report"),
    table: Annotated[
        Path | None,
        typer.Option(metavar="TABLE", help="Show what calibration measured, layer by layer."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="CHECKPOINT", help="Measure it too, and how far each bundle is off."),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE",
                     help="Text in UTF-8, or .jsonl with `text` or `messages`; repeatable. A part "
                     "of Python's documentation if left out."),
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = LENGTH,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first N windows of the text.")
    ] = None,
    threads: options.Threads = None,
    no_check: options.NoCheck = False,
    require_signature: options.RequireSignature = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:  # fmt: skip
    """Compare bundles: sizes, quality, and what calibration did, as a page and as text."""
    from calib.report.figures import require_matplotlib
    from calib.report.page import to_html
    from calib.report.rows import distinct
    from calib.report.sections import Report, grid_lines, sections, to_markdown
    from runtime.bundle.open import open_bundle

    require_matplotlib()
    _make(output)
    stage = stage_for(quiet=quiet or as_json)
    with stage("Checking the bundles", None):
        opened = [open_bundle(path, require_signature=require_signature) for path in bundles]
    manifests = [bundle.manifest for bundle in opened]
    calibration = None if table is None else _read_table(table, manifests)
    origin, windows = _text(bundles, manifests, text or [], length, limit)
    rows = [
        _measure(bundle, windows, against, threads, stage, check=not no_check) for bundle in opened
    ]
    measured = distinct(rows, [bundle.name for bundle in bundles])
    origin |= _origin(manifests, against)
    parts = sections(
        Report(measured=measured, origin=origin)
        if calibration is None
        else Report(measured=measured, origin=origin, calibration=_described(calibration),
                    facts=calibration.facts)
    )  # fmt: skip
    _write(output / PAGE, to_html(parts))
    _write(output / TEXT, to_markdown(parts))
    if as_json:
        found = [asdict(one) for one in measured]
        print(json.dumps({"page": str(output / PAGE), "text": str(output / TEXT),
                          "measured_on": origin, "measured": found}))  # fmt: skip
        return
    if parts[0].grid is not None:
        print("\n".join(grid_lines(parts[0].grid)))
    print(f"\n{output / PAGE} and {output / TEXT} have it all.")


def _make(output: Path) -> None:
    """Make the directory, or raise; nothing in it is touched yet."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--output is {output}, which cannot be made a directory ({error}); a directory for "
            "the report is expected. Choose another name."
        ) from error


def _read_table(path: Path, manifests: list["Manifest"]) -> "CalibrationTable":
    from exporter.quantization.calibration_table import CalibrationTable

    table = CalibrationTable.read(path)
    used = {(manifest.quantization or {}).get("calibration") for manifest in manifests}
    if table.fingerprint not in used:
        raise UsageError(
            f"--table is {path} ({table.precision} by {table.method}), and none of the bundles was "
            "made with it. Give the bundle that was, or leave --table out."
        )
    return table


def _text(
    bundles: list[Path], manifests: list["Manifest"], files: list[Path], length: int,
    limit: int | None,
) -> tuple[dict[str, str], "Ids"]:  # fmt: skip
    """Where the text is from, and its windows [n, length], which every bundle must read alike."""
    from exporter.checks.corpus import read_corpus, windows
    from runtime.measure.perplexity import check_windows
    from runtime.text.tokenizer import Tokenizer

    corpora = [read_corpus(files, Tokenizer.load(bundle), "evaluation") for bundle in bundles]
    for bundle, corpus in zip(bundles, corpora, strict=True):
        if corpus.fingerprint != corpora[0].fingerprint:
            raise UsageError(
                f"{bundles[0]} and {bundle} make different tokens of the same text, so their "
                "perplexities do not compare; bundles of one tokenizer are expected. Report on "
                "them one by one."
            )
    cut = windows(corpora[0], length, limit)
    for manifest in manifests:
        check_windows(manifest.build, cut)
    origin = {
        "text": corpora[0].source,
        "windows": f"{len(cut):,} of {length:,} tokens, each from an empty ring",
        "fingerprint of the text": corpora[0].fingerprint,
    }
    return origin, cut


def _measure(
    bundle: "Bundle", windows: "Ids", against: str | None, threads: int | None, stage: Stage, *,
    check: bool,
) -> "Measured":  # fmt: skip
    from calib.report.rows import Measured, method_of, name_of
    from exporter.checks.evaluate import evaluate, steps
    from runtime.bundle.sizes import read_bytes
    from runtime.load import load

    loaded, reference = load(bundle, threads=threads, check=check, stage=stage), None
    manifest = loaded.bundle.manifest
    if against is not None:
        from exporter.checks.verify import same_checkpoint
        from exporter.decoder.model import load_decoder

        with stage("Loading the checkpoint", None):
            reference = load_decoder(manifest.model, same_checkpoint(against, manifest).tensor)
    total = steps(windows, compared=reference is not None)
    with stage(f"Measuring {bundle.path.name}", total) as advance:
        found = evaluate(loaded.session, manifest.build, windows, reference, advance)
    return Measured(
        name=name_of(manifest),
        precision=manifest.precision,
        method=method_of(manifest),
        file_bytes=manifest.file_bytes,
        read_bytes=read_bytes(manifest.build),
        perplexity=found.perplexity,
        reference_perplexity=found.reference_perplexity,
        kl=found.kl,
        top1=found.top1,
    )


def _origin(manifests: list["Manifest"], against: str | None) -> dict[str, str]:
    """What the bundles are of, what wrote them, and what they were measured on."""
    from runtime.measure.bench import machine

    here = machine()
    processor, cores = here.pop("processor"), here.pop("cores")
    found = {
        "checkpoint": _each(f"{m.checkpoint['name']} ({m.checkpoint['format']})"
                            for m in manifests),
        "machine": f"{processor}, {cores} cores",
        "versions here": _versions(here),
        "versions that exported": _each(_versions(m.versions) for m in manifests),
    }  # fmt: skip
    if against is not None:
        found["reference"] = "the checkpoint in PyTorch, float32"
    return found


def _described(table: "CalibrationTable") -> dict[str, str]:
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


def _versions(versions: Any) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def _each(words: Any) -> str:
    """What all bundles have in common once, else everything that one of them has."""
    return "; ".join(dict.fromkeys(words))


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise MistralcError(
            f"The report could not be written to {path} ({error}). Make the directory writable, or "
            "choose another with --output."
        ) from error
