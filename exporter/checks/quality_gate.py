"""Is a quantized bundle good enough to be published? Knows nothing about how it was quantized.

The finished bundle reads text that no calibration saw, and its perplexity is compared with the
checkpoint's on the same windows. What it loses is written into the manifest, and a bundle that
loses more than allowed is refused.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.checkpoint.open import Checkpoint
from exporter.checks.corpus import read_corpus, windows
from exporter.checks.evaluate import evaluate, steps
from exporter.decoder.model import load_decoder
from graphs.errors import MistralcError, UsageError
from graphs.manifest import Manifest
from runtime.backends.session import Session
from runtime.system.progress import Stage
from runtime.text.tokenizer import Tokenizer

LENGTH = 512  # tokens of a window


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """How much perplexity a bundle may lose, 0.1 being 10 %, and on which text files.

    Without files it is the part of Python's documentation that is for evaluation.
    """

    max_ppl_increase: float = 0.1
    windows: int = 4  # of the text: seconds for a small model
    text: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if not self.max_ppl_increase > 0:
            raise UsageError(
                f"--max-ppl-increase is {self.max_ppl_increase}; a number above 0 is expected, "
                "such as 0.1 for 10 %."
            )


def measure(
    gate: Gate, session: Session, manifest: Manifest, checkpoint: Checkpoint,
    tokenizer: Tokenizer, stage: Stage,
) -> dict[str, Any]:  # fmt: skip
    """Return what the bundle loses, for its manifest. Raises MistralcError where it is too much."""
    corpus = read_corpus(gate.text, tokenizer, "evaluation")
    spec, context = manifest.model, manifest.ring.context
    cut = windows(corpus, LENGTH if spec.slides else min(LENGTH, context), gate.windows)
    with stage("Measuring perplexity", steps(cut, compared=True)) as advance:
        reference = load_decoder(spec, checkpoint.tensor)
        found = evaluate(session, manifest, cut, reference, advance)
    if found.reference_perplexity is None:
        raise ValueError("an evaluation with a reference has its perplexity")
    increase = found.perplexity / found.reference_perplexity - 1
    if not increase <= gate.max_ppl_increase:
        raise MistralcError(
            f"The {manifest.precision} bundle has a perplexity of {found.perplexity:.2f} where the "
            f"checkpoint has {found.reference_perplexity:.2f}: {increase:+.1%}, and "
            f"{gate.max_ppl_increase:+.1%} is allowed, so it is not published. Calibrate first "
            f"(`mistralc calibrate`), choose smaller blocks or another precision, or allow it with "
            "--max-ppl-increase."
        )
    return {**found.to_json(), "text": corpus.source, "windows": len(cut), "length": cut.shape[1],
            "allowed": gate.max_ppl_increase}  # fmt: skip
