"""The command `mistralc eval`.

Heavy imports are inside the functions, and torch is imported only to compare a bundle with its
checkpoint, so that a production host can measure what it serves.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from calib.cli.text_windows import measure_text, read_windows
from calib.options import TextOptions
from exporter.options import AdapterOptions
from runtime.cli import options as common
from runtime.system.progress import stage_for

if TYPE_CHECKING:
    from runtime.backends.session import Ids


def evaluate(
    *,
    bundle: common.BundlePath,
    text_options: TextOptions,
    against: Annotated[
        str | None,
        typer.Option(metavar="CHECKPOINT",
                     help="Also measure this checkpoint, and the bundle's divergence from it."),
    ] = None,
    adapters: AdapterOptions,
    choices: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl",
                     help="Answer multiple-choice questions. Text is then measured only if one of "
                     "its options is given."),
    ] = None,
    loading: common.LoadOptions,
    as_json: common.Json = False,
    quiet: common.Quiet = False,
) -> None:  # fmt: skip
    """Measure a bundle's perplexity, divergence from its checkpoint, and accuracy."""
    from calib.evaluation.multiple_choice import measure_accuracy, read_questions
    from runtime.bundle.open import open_bundle

    adapters.require_checkpoint(against)
    stage = stage_for(quiet=quiet or as_json)
    result: dict[str, Any] = {"bundle": str(bundle)}
    paragraphs: list[str] = []
    # All input is read and checked before the model is loaded.
    with stage("Checking the bundle", None):
        opened = open_bundle(bundle, require_signature=loading.require_signature)
    questions = None if choices is None else read_questions(choices)
    windows: Ids | None = None
    if questions is None or text_options.is_set or against is not None:
        corpus, windows = read_windows([bundle], [opened.manifest], text_options)
        count, length = windows.shape
        result["text"] = {"source": corpus.source, "fingerprint": corpus.fingerprint,
                          "windows": count, "length": length}  # fmt: skip
        paragraphs.append(f"Text: {corpus.source}; {count:,} windows of {length:,} tokens.\n")
    loaded = loading.load(opened, stage)
    if windows is not None:
        evaluation = measure_text(
            loaded, windows, against, stage, title="Measuring", lora=adapters.lora
        )
        result |= {"against": against, **evaluation.to_json()}
        paragraphs.append(evaluation.to_markdown())
    if questions is not None:
        build, session, tokenizer = opened.manifest.build, loaded.session, loaded.tokenizer
        with stage("Answering", len(questions)) as advance:
            accuracy = measure_accuracy(session, build, tokenizer, questions, advance)
        result["choices"] = accuracy.to_json()
        paragraphs.append(accuracy.to_markdown())
    print(json.dumps(result) if as_json else "\n".join(paragraphs), end="\n" if as_json else "")
