"""The commands that decide and measure numbers: calibrate, eval. Knows only the command line.

Heavy imports stand inside the commands, and torch is imported only where a bundle is compared with
its checkpoint: a production host can measure what it serves.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from calib.cli.calibrate import calibrate
from calib.cli.report import report
from runtime.cli import options
from runtime.system.progress import Stage, stage_for

if TYPE_CHECKING:
    from exporter.checks.evaluate import Evaluation
    from runtime.backends.session import Ids
    from runtime.load import Loaded

LENGTH = 512  # tokens of a window; perplexities of different lengths do not compare


def register(app: typer.Typer) -> None:
    """Add this package's commands to `app`."""
    app.command()(calibrate)
    app.command("eval")(evaluate)
    app.command()(report)


def evaluate(
    *,
    bundle: options.BundlePath,
    text: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE",
                     help="Text in UTF-8, or .jsonl with `text` or `messages`; repeatable. A part "
                     "of Python's documentation if left out."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="CHECKPOINT", help="Measure it too, and how far the bundle is off."),
    ] = None,
    choices: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl",
                     help="Answer multiple-choice questions; text is then measured only if an "
                     "option asks for it."),
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=2, help=f"Tokens of a window; {LENGTH} if left out.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first N windows of the text.")
    ] = None,
    threads: options.Threads = None,
    no_check: options.NoCheck = False,
    require_signature: options.RequireSignature = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:  # fmt: skip
    """Measure a bundle's perplexity, its distance from the checkpoint, its answers."""
    from calib.evaluation.multiple_choice import measure, read_questions
    from exporter.checks.corpus import read_corpus, windows
    from runtime.bundle.open import open_bundle
    from runtime.load import load
    from runtime.measure.perplexity import check_windows
    from runtime.text.tokenizer import Tokenizer

    stage = stage_for(quiet=quiet or as_json)
    result: dict[str, Any] = {"bundle": str(bundle)}
    report: list[str] = []
    # What was given is read, and refused, before the model is loaded.
    with stage("Checking the bundle", None):
        opened = open_bundle(bundle, require_signature=require_signature)
    manifest = opened.manifest
    questions = None if choices is None else read_questions(choices)
    cut: Ids | None = None
    if questions is None or text or any(value is not None for value in (against, length, limit)):
        corpus = read_corpus(text or (), Tokenizer.load(bundle), "evaluation")
        cut = windows(corpus, length or LENGTH, limit)
        check_windows(manifest.build, cut)
        count, size = cut.shape
        result["text"] = {"source": corpus.source, "fingerprint": corpus.fingerprint,
                          "windows": count, "length": size}  # fmt: skip
        report.append(f"Text: {corpus.source}; {count:,} windows of {size:,} tokens.\n")
    loaded = load(opened, threads=threads, check=not no_check, stage=stage)
    if cut is not None:
        evaluation = _evaluate(loaded, cut, against, stage)
        result |= {"against": against, **evaluation.to_json()}
        report.append(evaluation.to_markdown())
    if questions is not None:
        with stage("Answering", len(questions)) as advance:
            session, tokenizer = loaded.session, loaded.tokenizer
            accuracy = measure(session, manifest, tokenizer, questions, advance)
        result["choices"] = accuracy.to_json()
        report.append(accuracy.to_markdown())
    print(json.dumps(result) if as_json else "\n".join(report), end="\n" if as_json else "")


def _evaluate(loaded: "Loaded", windows: "Ids", against: str | None, stage: Stage) -> "Evaluation":
    from exporter.checks import evaluate as evaluation

    manifest, reference = loaded.bundle.manifest, None
    if against is not None:
        from exporter.checks.verify import same_checkpoint
        from exporter.decoder.model import load_decoder

        with stage("Loading the checkpoint", None):
            reference = load_decoder(manifest.model, same_checkpoint(against, manifest).tensor)
    total = evaluation.steps(windows, compared=reference is not None)
    with stage("Measuring", total) as advance:
        return evaluation.evaluate(loaded.session, manifest.build, windows, reference, advance)
