"""How well a session predicts windows of text. Knows nothing about text, and no backend.

Every window is read from an empty ring in the pieces in which the runtime reads a prompt. Of its
n tokens, n - 1 are predicted, each from all before it in the window. Perplexity is the exponential
of the mean negative log-likelihood, over all predictions of all windows.
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

ROWS = 64  # of logits at once: 64 x 131,072 float32 are 34 MB, whatever the chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What was predicted: the sum of negative log-likelihoods in nats, and of how many tokens."""

    nll: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """The exponential of the mean; infinite where that is beyond a float."""
        mean = self.nll / self.tokens
        return math.exp(mean) if mean < 700 else math.inf  # e^709 is the largest


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """Logits [n, V] of one piece and the tokens [n] that came true; `start` is the first's place.

    Row i was computed after token `start + i` of window number `window`, and targets[i] is the
    token that follows it there. `logits` is the session's own buffer, valid until the next step.
    """

    window: int
    start: int
    logits: Logits
    targets: Ids


def score(session: Session, build: Build, windows: Ids, progress: Progress | None = None) -> Scores:
    """Score windows [n, length]; raises UsageError where they do not fit the bundle.

    Memory is that of one piece's logits, however many windows there are.
    """
    nll, tokens = 0.0, 0
    for piece in predictions(session, build, windows, progress):
        found = log_likelihoods(piece.logits, piece.targets)
        require_finite(found, piece)
        nll -= float(found.sum())
        tokens += len(found)
    return Scores(nll=nll, tokens=tokens)


def predictions(
    session: Session, build: Build, windows: Ids, progress: Progress | None = None
) -> Iterator[Predictions]:
    """Yield the predictions of windows [n, length] piece by piece, in order.

    The last token of a window is not fed, for nothing is asked after it.
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
    """Natural logarithm of the probability that row i of logits [n, V] gives to targets[i]: [n].

    Exponentials are taken in float32, which makes an error of 1e-7 of each, and summed in
    float64, a block of rows at a time.
    """
    found = np.empty(len(targets))
    for begin in range(0, len(targets), ROWS):
        block, wanted = logits[begin : begin + ROWS], targets[begin : begin + ROWS, None]
        with np.errstate(invalid="ignore"):  # infinity less infinity is NaN, which callers refuse
            shifted = block - block.max(axis=-1, keepdims=True)
        total = np.log(np.exp(shifted).sum(axis=-1, dtype=np.float64))
        found[begin : begin + ROWS] = np.take_along_axis(shifted, wanted, axis=-1)[:, 0] - total
    return found


def divergences(p: Logits, q: Logits) -> Iterator[NDArray[np.float64]]:
    """KL(p || q) in nats of each row of logits [n, V], in blocks of rows.

    All in float64: between a graph and its reference it may be 1e-10, the remainder of terms that
    cancel, where float32 would leave nothing but its own rounding.
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
    """Raise UsageError unless the bundle can read windows [n, length] of such ids."""
    spec, context = build.spec, build.ring.context
    length = windows.shape[1]
    if not spec.slides and length > context:
        raise UsageError(
            f"Windows of {length:,} tokens were asked for, and this bundle holds {context:,} in "
            f"all. Give --length {context} or less, or export the checkpoint again with a larger "
            "--context, or with --window to let it slide."
        )
    check_ids(build, windows)


def check_ids(build: Build, ids: Ids) -> None:
    """Raise MistralcError where a token is none of the model's: an embedding has no row for it."""
    low, high, size = int(ids.min()), int(ids.max()), build.spec.vocab_size
    if low < 0 or high >= size:
        raise MistralcError(
            f"The text holds token {low if low < 0 else high}; this model's tokens are 0 to "
            f"{size - 1}. Encode it with the tokenizer of the bundle's own checkpoint."
        )


def require_finite(found: NDArray[np.float64], piece: Predictions) -> None:
    """Raise MistralcError where a likelihood is NaN or infinite, as broken logits make it."""
    if not np.isfinite(found).all():
        at = piece.start + int(np.argmin(np.isfinite(found)))
        raise MistralcError(
            f"The bundle's logits hold NaN or infinity after token {at} of window {piece.window}; "
            "finite numbers are expected. Run `mistralc verify` on the bundle, and report this "
            "with its manifest."
        )
