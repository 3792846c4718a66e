"""Golden tokens: a known text with known answers, replayed when a bundle is loaded.

Engines have been miscompiled in the field, for one GPU or one batch size, and nothing in the
file tells. So the export records which token the reference likes best after each position of a
short text, wherever its preference is clear, and a host that prefers another must not serve.
Knows nothing about how the answers were found.
"""

from collections import abc
from typing import Any

import numpy as np

from graphs.errors import MistralcError
from runtime.backends.session import Logits, Session, fewest_rows
from runtime.decoding.ring import Ring
from runtime.decoding.sequence import Sequence

Golden = abc.Mapping[str, Any]  # {"ids": [token, …], "expected": [[position, token], …]}
TOGETHER = 8  # tokens that are computed one by one and at once: as many as a long draft


def replay(session: Session, ring: Ring, texts: abc.Sequence[Golden], device: str) -> None:
    """Run each text as it would be used, first half at once, then token by token.

    Several rows, where the session has them, run it side by side: a kernel for one row may be
    another than that for many. Leaves the ring at position 0. Raises MistralcError, naming the
    first position that differs, unless every clear preference is the reference's.
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
                f"This bundle does not compute here what it computed where it was made: after "
                f"position {position} of a known text it prefers token {got} and the reference "
                f"token {expected} ({len(wrong)} of {len(text['expected'])} known tokens differ on "
                f"{device}). Do not use it: update the backend or driver, or export it again. "
                "--no-check loads it all the same."
            )


def require_invariance(session: Session, ring: Ring, texts: abc.Sequence[Golden]) -> None:
    """Compute the last tokens of each text one by one and at once.

    Leaves the ring at position 0. Raises MistralcError unless their logits are the same in bits,
    which depends on the processor: its kernels are not those of another.
    """
    sequence = Sequence(session, ring)
    for ids in (text["ids"] for text in texts if len(text["ids"]) > 1):
        count = min(TOGETHER, ring.limits.chunk, len(ids) - 1)
        begin = len(ids) - count
        ring.rewind(0)
        turns = [begin, *[1] * count]
        one_by_one = np.concatenate([step.copy() for step in _logits(sequence, ids, turns)])
        ring.rewind(begin)
        together = np.concatenate([step.copy() for step in _logits(sequence, ids, [count])])
        ring.rewind(0)
        difference = float(np.abs(together - one_by_one[begin:]).max())
        if difference:
            raise MistralcError(
                "This bundle was to compute the same bits for a token alone and among others, and "
                f"does not on this processor: logits of {count} tokens at once and one by one "
                f"differ by up to {difference:.2g}. Its products round otherwise for one row where "
                "blocks are large: calibrate or export with --block 32, or leave --batch-invariant "
                "out."
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
