"""Golden tokens: a known text with known answers, replayed when a bundle is loaded.

Engines have been miscompiled in the field, for one GPU or one batch size, and nothing in the
file tells. So the export records which token the reference likes best after each position of a
short text, wherever its preference is clear, and a host that prefers another must not serve.
Knows nothing about how the answers were found.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from graphs.errors import MistralcError
from runtime.backends.session import Logits, Session, fewest_rows
from runtime.decoding.ring import Ring

Golden = Mapping[str, Any]  # {"ids": [token, …], "expected": [[position, token], …]}
TOGETHER = 8  # tokens that are computed one by one and at once: as many as a long draft


def replay(session: Session, ring: Ring, texts: Sequence[Golden], device: str) -> None:
    """Run each text as it would be used, first half at once, then token by token.

    Several rows, where the session has them, run it side by side: a kernel for one row may be
    another than that for many. Leaves the ring at position 0. Raises MistralcError, naming the
    first position that differs, unless every clear preference is the reference's.
    """
    side_by_side = fewest_rows(session)
    for text in texts:
        ids, half = text["ids"], len(text["ids"]) // 2
        ring.rewind(0)
        turns = [half, *[1] * (len(ids) - half)]
        steps = _logits(session, ring, ids, turns, side_by_side)
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


def require_invariance(session: Session, ring: Ring, texts: Sequence[Golden]) -> None:
    """Compute the last tokens of each text one by one and at once.

    Leaves the ring at position 0. Raises MistralcError unless their logits are the same in bits,
    which depends on the processor: its kernels are not those of another.
    """
    for ids in (text["ids"] for text in texts if len(text["ids"]) > 1):
        count = min(TOGETHER, ring.limits.chunk, len(ids) - 1)
        begin = len(ids) - count
        ring.rewind(0)
        turns = [begin, *[1] * count]
        one_by_one = np.concatenate([step.copy() for step in _logits(session, ring, ids, turns)])
        ring.rewind(begin)
        together = np.concatenate([step.copy() for step in _logits(session, ring, ids, [count])])
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
    session: Session, ring: Ring, ids: Sequence[int], turns: Iterable[int], rows: int = 1
) -> Iterator[Logits]:
    """Feed `ids`, from the ring's position on, in turns of these lengths, in `rows` rows alike.

    Yields each step's logits [S, V] of the first row, valid until the next step.
    """
    text = np.tile(np.asarray(ids, np.int64), (rows, 1))  # [rows, n]
    for count in (piece for turn in turns if turn for piece in list(ring.pieces(turn))):
        if ring.grow(count):
            session.resize(ring.capacities)
        here = ring.positions[0]
        indices = np.tile(np.arange(count, dtype=np.int64), (rows, 1))
        step = np.ascontiguousarray(text[:, here : here + count])
        yield session.step(step, indices + here, indices)[0]
        ring.advance(count)
