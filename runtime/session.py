"""What the generator asks of a backend. Knows none of them.

A session owns the memory of the ring and runs the graph; it knows nothing about text, sampling
or where a sequence stands.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]


class Session(Protocol):
    """A loaded model with its ring."""

    def resize(self, capacities: Mapping[int | None, int]) -> None:
        """Give the ring these capacities, by window, keeping the prefix that it holds."""

    def step(self, input_ids: Ids, position_ids: Ids, logits_indices: Ids) -> Logits:
        """Write tokens [B, S] at positions [B, S]; return logits [B, T, V] of the rows asked for.

        The result is the session's own buffer, valid until the next step.
        """
