"""Read the text that eval and report measure on, and measure one bundle on it.

Heavy imports are inside the functions; torch is imported only if there is a reference.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from calib.options import TextOptions
from graphs.errors import UsageError
from runtime.system.progress import Stage

if TYPE_CHECKING:
    from exporter.checks.corpus import Corpus
    from exporter.checks.evaluate import Evaluation
    from graphs.manifest import Manifest
    from runtime.backends.session import Ids
    from runtime.load import Loaded


def read_windows(
    bundles: Sequence[Path], manifests: Sequence["Manifest"], options: TextOptions
) -> tuple["Corpus", "Ids"]:
    """Read the text and cut it into windows [n, length] that every bundle can read.

    Raises UsageError if two bundles tokenize it differently, or if a bundle's context is too short.
    """
    from exporter.checks.corpus import read_corpus, windows
    from runtime.measure.perplexity import check_windows
    from runtime.text.tokenizer import Tokenizer

    corpora = [read_corpus(options.text, Tokenizer.load(path), "evaluation") for path in bundles]
    for path, corpus in zip(bundles, corpora, strict=True):
        if corpus.fingerprint != corpora[0].fingerprint:
            raise UsageError(
                f"{bundles[0]} and {path} make different tokens of the same text, so their "
                "perplexities are not comparable; expected bundles with the same tokenizer. Report "
                "on them one by one."
            )
    ids = windows(corpora[0], options.length_or_default, options.limit)
    for manifest in manifests:
        check_windows(manifest.build, ids)
    return corpora[0], ids


def measure_text(
    loaded: "Loaded", windows: "Ids", against: str | None, stage: Stage, title: str,
    lora: Sequence[str] = (),
) -> "Evaluation":  # fmt: skip
    """Measure a bundle on windows [n, length], compared with the checkpoint `against` if given.

    `lora` are the adapters that were merged into it.
    """
    from exporter.checks.evaluate import evaluate, steps

    build, reference = loaded.bundle.manifest.build, None
    if against is not None:
        from exporter.checkpoint.read_ahead import ReadAhead
        from exporter.checks.verify import same_checkpoint
        from exporter.decoder.load import load_decoder

        with stage("Loading the checkpoint", None):
            checkpoint = same_checkpoint(against, loaded.bundle.manifest, lora)
            reference = load_decoder(build.spec, ReadAhead(checkpoint))
    with stage(title, steps(windows, compared=reference is not None)) as advance:
        return evaluate(loaded.session, build, windows, reference, advance)
