"""Quality gate: reject a quantized bundle whose perplexity grew too much.

The finished bundle reads text that no calibration saw, and its perplexity is compared with the
checkpoint's on the same windows. The result goes into the manifest and the report. Knows nothing
about how the bundle was quantized.
"""

from collections.abc import Mapping
from dataclasses import fields
from math import inf
from typing import Any

from exporter.checkpoint.open import Checkpoint
from exporter.checkpoint.read_ahead import ReadAhead
from exporter.checks.corpus import read_corpus, windows
from exporter.checks.evaluate import Evaluation, evaluate, steps
from exporter.checks.texts import gate_text
from exporter.decoder.load import load_decoder
from exporter.options import GateOptions
from graphs.build import Build
from graphs.errors import MistralcError
from runtime.backends.session import Session
from runtime.system.progress import Stage
from runtime.text.tokenizer import Tokenizer


def measure(
    gate: GateOptions, session: Session, build: Build, checkpoint: Checkpoint,
    tokenizer: Tokenizer, stage: Stage,
) -> dict[str, Any]:  # fmt: skip
    """Return what the bundle loses, for its manifest. Raises MistralcError if it is too much.

    A large model reads fewer tokens, in one pass over its weights; the result says so.
    """
    corpus = read_corpus(gate.text, tokenizer, "evaluation")
    read = gate_text(build)
    cut = windows(corpus, read.length, read.windows)
    with stage("Measuring perplexity", steps(cut, compared=True)) as advance:
        reference = load_decoder(build.spec, ReadAhead(checkpoint))
        found = evaluate(session, build, cut, reference, advance)
    if found.reference_perplexity is None:
        raise ValueError("an evaluation with a reference has its perplexity")
    increase = found.perplexity / found.reference_perplexity - 1
    if not increase <= gate.max_ppl_increase:
        raise MistralcError(
            f"The {build.precision.name} bundle has a perplexity of {found.perplexity:.2f}; the "
            f"checkpoint has {found.reference_perplexity:.2f}: {increase:+.1%}, and "
            f"{gate.max_ppl_increase:+.1%} is allowed, so it is not published. Calibrate first "
            f"(`mistralc calibrate`), choose smaller blocks or another precision, or allow it with "
            "--max-ppl-increase."
        )
    return {**found.to_json(), "text": corpus.source, "windows": len(cut), "length": cut.shape[1],
            "allowed": gate.max_ppl_increase,
            **({"shortened": read.shortened} if read.shortened else {})}  # fmt: skip


def to_markdown(record: Mapping[str, Any]) -> str:
    """Return a measurement's record as the section that goes into `report/verify.md`."""
    found: dict[str, Any] = {each.name: record[each.name] for each in fields(Evaluation)}
    for name, value in found.items():
        found[name] = inf if value is None else value
    figures = Evaluation(**found)
    shortened = record.get("shortened")
    return "\n".join([
        "# Quality",
        "",
        f"Perplexity of this bundle beside the checkpoint's, on {record['windows']} windows of "
        f"{record['length']} tokens of {record['text']}.",
        "",
        figures.to_markdown(),
        f"Allowed: an increase of {record['allowed']:.0%}.",
        *(["", f"Shortened: {shortened}."] if shortened else []),
        "",
    ])  # fmt: skip
