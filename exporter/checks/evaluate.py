"""How far a bundle is from the checkpoint it was made of. Knows nothing about text or commands.

Perplexity says how well the bundle predicts; the Kullback-Leibler divergence from the reference
and the share of equal first choices say what quantizing changed, and show a change that perplexity
averages away. The reference is the PyTorch decoder in float32 on the checkpoint's weights, with
the bundle's own windows. Without a reference nothing here needs torch.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from graphs.build import Build
from runtime.backends.session import Ids, Logits, Session
from runtime.measure.perplexity import (
    Progress,
    Scores,
    divergences,
    log_likelihoods,
    predictions,
    require_finite,
    score,
)

if TYPE_CHECKING:
    from exporter.decoder.model import Decoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What was measured over `tokens` predictions; the last three are None without a reference.

    `kl` is the mean Kullback-Leibler divergence KL(reference || bundle) in nats, `top1` the share
    of positions where both prefer the same token.
    """

    perplexity: float
    tokens: int
    reference_perplexity: float | None = None
    kl: float | None = None
    top1: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data; a perplexity beyond a float is null, for JSON has no infinity."""
        return {name: value if value is None or np.isfinite(value) else None
                for name, value in asdict(self).items()}  # fmt: skip

    def to_markdown(self) -> str:
        """A table of one row."""
        lines = ["| tokens | perplexity |", "| ---: | ---: |"]
        row = f"| {self.tokens:,} | {self.perplexity:.4f} |"
        if self.reference_perplexity is not None:
            lines[0] += " reference | change | KL (nats) | top-1 agreement |"
            lines[1] += " ---: | ---: | ---: | ---: |"
            change = self.perplexity / self.reference_perplexity - 1
            row += f" {self.reference_perplexity:.4f} | {change:+.2%} | {self.kl:.2e} |"
            row += f" {self.top1:.2%} |"
        return "\n".join([*lines, row, ""])


def evaluate(
    session: Session,
    build: Build,
    windows: Ids,
    reference: "Decoder | None" = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate windows [n, length]; `progress` counts each once, with a reference twice.

    Memory is one window's logits of the reference, and one piece's of the bundle. Raises
    UsageError where the windows do not fit the bundle.
    """
    if reference is None:
        scores = score(session, build, windows, progress)
        return Evaluation(perplexity=scores.perplexity, tokens=scores.tokens)
    ours, theirs, kl, agreed, tokens = 0.0, 0.0, 0.0, 0, 0
    current, expected = -1, np.empty((0, 0), np.float32)
    for piece in predictions(session, build, windows, progress):
        if piece.window != current:
            current, expected = piece.window, _reference_logits(reference, windows[piece.window])
            if progress is not None:
                progress(len(expected))
        wanted = expected[piece.start : piece.start + len(piece.targets)]  # [n, V]
        found = log_likelihoods(piece.logits, piece.targets)
        require_finite(found, piece)
        ours -= float(found.sum())
        theirs -= float(log_likelihoods(wanted, piece.targets).sum())
        kl += sum(float(block.sum()) for block in divergences(wanted, piece.logits))
        agreed += int((wanted.argmax(-1) == piece.logits.argmax(-1)).sum())
        tokens += len(found)
    return Evaluation(
        perplexity=Scores(nll=ours, tokens=tokens).perplexity,
        tokens=tokens,
        reference_perplexity=Scores(nll=theirs, tokens=tokens).perplexity,
        kl=kl / tokens,
        top1=agreed / tokens,
    )


def steps(windows: Ids, *, compared: bool) -> int:
    """How far `evaluate` counts: tokens that it reads, by itself and by the reference."""
    read: int = windows[:, 1:].size
    return 2 * read if compared else read


def _reference_logits(reference: "Decoder", window: Ids) -> Logits:
    """Logits [n - 1, V] of one pass over the window [n]: one for every token but the last."""
    import torch

    from exporter.decoder.model import logits_at

    ids = torch.from_numpy(np.ascontiguousarray(window[:-1]))
    logits: Logits = logits_at(reference, ids, torch.arange(len(ids))).numpy()
    return logits
