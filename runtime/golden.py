"""Golden tokens: a known text with known answers, replayed when a bundle is loaded.

Engines have been miscompiled in the field, for one GPU or one batch size, and nothing in the
file tells. So the export records which token the reference likes best after each position of a
short text, wherever its preference is clear, and a host that prefers another must not serve.
Knows nothing about how the answers were found.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from graphs.errors import MistralcError
from runtime.ring import Ring
from runtime.session import Session, fewest_rows

Golden = Mapping[str, Any]  # {"ids": [token, …], "expected": [[position, token], …]}


def replay(session: Session, ring: Ring, texts: Sequence[Golden], device: str) -> None:
    """Run each text as it would be used, first half at once, then token by token.

    Several rows, where the session has them, run it side by side: a kernel for one row may be
    another than that for many. Leaves the ring at position 0. Raises MistralcError, naming the
    first position that differs, unless every clear preference is the reference's.
    """
    side_by_side = fewest_rows(session)
    for text in texts:
        ids = np.tile(np.asarray(text["ids"], np.int64), (side_by_side, 1))  # [rows, n]
        ring.rewind(0)
        answers: list[int] = []
        turns = [ids.shape[1] // 2, *[1] * (ids.shape[1] - ids.shape[1] // 2)]
        for count in (piece for turn in turns if turn for piece in list(ring.pieces(turn))):
            if ring.grow(count):
                session.resize(ring.capacities)
            here = ring.positions[0]
            rows = np.tile(np.arange(count, dtype=np.int64), (side_by_side, 1))
            step = np.ascontiguousarray(ids[:, here : here + count])
            answers += session.step(step, rows + here, rows)[0].argmax(-1).tolist()
            ring.advance(count)
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
