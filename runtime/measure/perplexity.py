"""Perplexity of a session on windows of tokens. Knows no text and no backend.

Each window is read from an empty ring, in the pieces in which the runtime reads a prompt. Of its n
tokens, n - 1 are predicted, each from all tokens before it in the window. Perplexity is the
exponential of the mean negative log-likelihood over all predictions of all windows.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graphs.build import Build
from graphs.errors import MistralcError, UsageError
from runtime.backends.session import Ids, Logits, Session
from runtime.decoding.sequence import Sequence
from runtime.load import make_ring

Progress = Callable[[int], None]  # called with the number of tokens just read

ROWS = 64  # of logits processed at once: 64 x 131,072 float32 are 34 MB for any chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The sum of negative log-likelihoods in nats, and the number of predicted tokens."""

    nll: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """The exponential of the mean; infinite if that exceeds a float."""
        mean = self.nll / self.tokens
        return math.exp(mean) if mean < 700 else math.inf  # the largest float is e^709


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """Logits [n, V] of one piece of window number `window`, and the tokens [n] that follow.

    Row i was computed after token `start + i` of the window, and `targets[i]` is the token that
    follows it there. `logits` is the session's own buffer, valid until the next step.
    """

    window: int
    start: int
    logits: Logits
    targets: Ids


def score(session: Session, build: Build, windows: Ids, progress: Progress | None = None) -> Scores:
    """Score windows [n, length]; raises UsageError if they do not fit the bundle.

    Takes the memory of one piece's logits for any number of windows.
    """
    nll, tokens = 0.0, 0
    for piece in predictions(session, build, windows, progress):
        likelihoods = log_likelihoods(piece.logits, piece.targets)
        require_finite(likelihoods, piece)
        nll -= float(likelihoods.sum())
        tokens += len(likelihoods)
    return Scores(nll=nll, tokens=tokens)


def predictions(
    session: Session, build: Build, windows: Ids, progress: Progress | None = None
) -> Iterator[Predictions]:
    """Yield the predictions of windows [n, length] piece by piece, in order.

    The last token of a window is not fed, because nothing is predicted after it.
    """
    check_windows(build, windows)
    for number, window in enumerate(windows):
        sequence = Sequence(session, make_ring(build))
        fed = window[:-1]
        for start, count, logits in sequence.feed(fed, np.arange(len(fed))):
            targets = window[start + 1 : start + 1 + count]
            yield Predictions(window=number, start=start, logits=logits, targets=targets)
            if progress is not None:
                progress(count)


def log_likelihoods(logits: Logits, targets: Ids) -> NDArray[np.float64]:
    """Log-probability in nats of targets[i] under row i of logits [n, V]: [n].

    Exponentials are float32, each with a relative error of 1e-7, and summed in float64, in blocks
    of rows.
    """
    found = np.empty(len(targets))
    for begin in range(0, len(targets), ROWS):
        block, wanted = logits[begin : begin + ROWS], targets[begin : begin + ROWS, None]
        with np.errstate(invalid="ignore"):  # infinity - infinity is NaN, which callers reject
            shifted = block - block.max(axis=-1, keepdims=True)
        total = np.log(np.exp(shifted).sum(axis=-1, dtype=np.float64))
        found[begin : begin + ROWS] = np.take_along_axis(shifted, wanted, axis=-1)[:, 0] - total
    return found


def divergences(p: Logits, q: Logits) -> Iterator[NDArray[np.float64]]:
    """Yield KL(p || q) in nats of each row of logits [n, V], in blocks of rows.

    All in float64: between a graph and its reference the divergence may be 1e-10, the remainder of
    terms that cancel, which float32's rounding would exceed.
    """
    for begin in range(0, len(p), ROWS):
        log_p, log_q = (_log_softmax(logits[begin : begin + ROWS]) for logits in (p, q))
        yield (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def _log_softmax(logits: Logits) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return result


def check_windows(build: Build, windows: Ids) -> None:
    """Raise UsageError unless windows [n, length] fit the bundle and its vocabulary."""
    spec, context = build.spec, build.ring.context
    length = windows.shape[1]
    if not spec.slides and length > context:
        raise UsageError(
            f"Windows of {length:,} tokens were asked for, and this bundle holds {context:,} in "
            f"all. Give --length {context} or less, or export the checkpoint again with a larger "
            "--context or with a sliding --window."
        )
    check_ids(build, windows)


def check_ids(build: Build, ids: Ids) -> None:
    """Raise MistralcError if a token is not one of the model's: the embedding has no row for it."""
    low, high, size = int(ids.min()), int(ids.max()), build.spec.vocab_size
    if low < 0 or high >= size:
        raise MistralcError(
            f"The text holds token {low if low < 0 else high}; this model's tokens are 0 to "
            f"{size - 1}. Encode it with the tokenizer of the bundle's own checkpoint."
        )


def require_finite(likelihoods: NDArray[np.float64], piece: Predictions) -> None:
    """Raise MistralcError if a log-likelihood is NaN or infinite, which broken logits cause."""
    if not np.isfinite(likelihoods).all():
        at = piece.start + int(np.argmin(np.isfinite(likelihoods)))
        raise MistralcError(
            f"The bundle's logits hold NaN or infinity after token {at} of window {piece.window}; "
            "finite numbers are expected. Run `mistralc verify` on the bundle, and report this "
            "with its manifest."
        )
