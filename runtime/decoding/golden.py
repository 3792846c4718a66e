"""Golden tokens: a known text with known answers, replayed when a bundle is loaded.

Compilers have produced wrong engines for one GPU or one batch size, and the file does not show it.
So the export records the reference's most likely token after each position of a short text,
wherever the reference's preference is clear. A host that prefers another token must not serve the
bundle. Knows nothing about how the answers were found.
"""

from collections import abc
from typing import Any

import numpy as np

from graphs.errors import MistralcError
from runtime.backends.session import Logits, Session, fewest_rows
from runtime.decoding.ring import Ring
from runtime.decoding.sequence import Sequence

Golden = abc.Mapping[str, Any]  # {"ids": [token, …], "expected": [[position, token], …]}
COMPARED = 8  # tokens that are computed both one by one and at once: as many as a long draft


def replay(session: Session, ring: Ring, texts: abc.Sequence[Golden], device: str) -> None:
    """Run each text as it would be used: the first half at once, then token by token.

    A session with several rows runs the text in `fewest_rows` of them, because single-row kernels
    may differ from multi-row ones. Leaves the ring at position 0. Raises MistralcError that names
    the first position with another token than the reference's; `device` is named in it too.
    """
    sequence = Sequence(session, ring, fewest_rows(session))
    for text in texts:
        ids, half = text["ids"], len(text["ids"]) // 2
        ring.rewind(0)
        turns = [half, *[1] * (len(ids) - half)]
        steps = _logits(sequence, ids, turns)
        answers = [token for logits in steps for token in logits.argmax(-1).tolist()]
        ring.rewind(0)
        wrong = [(p, token, answers[p]) for p, token in text["expected"] if answers[p] != token]
        if wrong:
            position, expected, got = wrong[0]
            raise MistralcError(
                f"This bundle does not compute here what its checkpoint computes: after position "
                f"{position} of a known text it prefers token {got}; the reference prefers "
                f"{expected} ({len(wrong)} of {len(text['expected'])} known tokens differ on "
                f"{device}). Do not use it: update the backend or driver, or export it again. "
                "--no-check loads it regardless."
            )


def require_invariance(session: Session, ring: Ring, texts: abc.Sequence[Golden]) -> None:
    """Compute the last tokens of each text both one by one and at once.

    Leaves the ring at position 0. Raises MistralcError unless the logits are bit-identical. That
    depends on the processor, which decides the kernels that are used.
    """
    sequence = Sequence(session, ring)
    for ids in (text["ids"] for text in texts if len(text["ids"]) > 1):
        count = min(COMPARED, ring.limits.chunk, len(ids) - 1)
        begin = len(ids) - count
        ring.rewind(0)
        turns = [begin, *[1] * count]
        one_by_one = np.concatenate([step.copy() for step in _logits(sequence, ids, turns)])
        ring.rewind(begin)
        at_once = np.concatenate([step.copy() for step in _logits(sequence, ids, [count])])
        ring.rewind(0)
        difference = float(np.abs(at_once - one_by_one[begin:]).max())
        if difference:
            raise MistralcError(
                "This bundle should compute the same bits for a token alone and among others, but "
                f"on this processor the logits of {count} tokens at once and one by one differ by "
                f"up to {difference:.2g}. With large blocks, matrix products of one row round "
                "differently: calibrate or export with --block 32, or omit --batch-invariant."
            )


def _logits(
    sequence: Sequence, ids: abc.Sequence[int], turns: abc.Iterable[int]
) -> abc.Iterator[Logits]:
    """Feed `ids`, from the sequence's position on, in turns of these lengths.

    Yields each step's logits [S, V], valid until the next step.
    """
    for count in turns:
        begin = sequence.position
        text = np.asarray(ids[begin : begin + count], np.int64)
        for piece in sequence.feed(text, np.arange(count)):
            yield piece.logits
