"""Is a quantized bundle good enough to be published? Knows nothing about how it was quantized.

The finished bundle reads text that no calibration saw, and its perplexity is compared with the
checkpoint's on the same windows. What it loses is written into the manifest, and a bundle that
loses more than allowed is refused.
"""

from typing import Any

from exporter.checkpoint.open import Checkpoint
from exporter.checks.corpus import read_corpus, windows
from exporter.checks.evaluate import evaluate, steps
from exporter.decoder.model import load_decoder
from exporter.options import GateOptions
from graphs.build import Build
from graphs.errors import MistralcError
from runtime.backends.session import Session
from runtime.system.progress import Stage
from runtime.text.tokenizer import Tokenizer

LENGTH = 512  # tokens of a window
WINDOWS = 4  # of the text: seconds for a small model


def measure(
    gate: GateOptions, session: Session, build: Build, checkpoint: Checkpoint,
    tokenizer: Tokenizer, stage: Stage,
) -> dict[str, Any]:  # fmt: skip
    """Return what the bundle loses, for its manifest. Raises MistralcError if it is too much."""
    corpus = read_corpus(gate.text, tokenizer, "evaluation")
    spec, context = build.spec, build.ring.context
    cut = windows(corpus, LENGTH if spec.slides else min(LENGTH, context), WINDOWS)
    with stage("Measuring perplexity", steps(cut, compared=True)) as advance:
        reference = load_decoder(spec, checkpoint.tensor)
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
            "allowed": gate.max_ppl_increase}  # fmt: skip
