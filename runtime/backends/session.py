"""The interface of a backend. Knows none of the backends.

A session owns the memory of the ring and runs the graph; it knows nothing about text, sampling
or where a sequence stands.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from graphs.errors import MistralcError

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]
Slots = Mapping[int | None, slice]  # by window: a range of the ring's slots
Caches = list[NDArray[Any]]  # each layer's key, then its value: [K, slots, D]


def check_ids(ids: Iterable[int], vocab_size: int) -> None:
    """Raise MistralcError unless all of `ids` are below `vocab_size` and none is negative."""
    wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise MistralcError(
            f"Token {wrong} was given; this model's tokens are 0 to {vocab_size - 1}. "
            "Encode the text with the bundle's own tokenizer."
        )


def check_prompt(ids: Sequence[int], vocab_size: int) -> None:
    """Raise MistralcError unless `ids` has at least one token and all are the model's."""
    if not len(ids):
        raise MistralcError("No token was given; at least one is expected.")
    check_ids(ids, vocab_size)


class Session(Protocol):
    """A loaded model with a ring of `batch` rows.

    If `partial` is false, the backend's shapes are fixed and every step takes all rows.
    """

    batch: int
    partial: bool

    def resize(self, capacities: Mapping[int | None, int]) -> None:
        """Give the ring these capacities, by window, and keep the prefix that it holds."""

    def step(
        self, input_ids: Ids, position_ids: Ids, logits_indices: Ids, first: int = 0
    ) -> Logits:
        """Write tokens [B, S] at positions [B, S]; returns the logits [B, T, V] at the indices.

        `logits_indices` [B, T] are indices into S. A `partial` session also takes n rows, [n, S]:
        row `first` and those after it; the other rows are not touched. The result is the session's
        own buffer, valid until the next step.
        """

    def read_row(self, row: int, slots: Slots) -> Caches:
        """Copy these slots of one row out of the ring, in the backend's own type."""

    def write_row(self, row: int, slots: Slots, caches: Caches) -> None:
        """Write what `read_row` returned for as many slots; other rows are not touched."""


def fewest_rows(session: Session) -> int:
    """The smallest number of rows in a decode step from which a row's logits stay the same.

    Single-row kernels round differently from multi-row ones; all multi-row ones agree.
    """
    return min(2, session.batch) if session.partial else session.batch
