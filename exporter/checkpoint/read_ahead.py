"""Read the weights that come next from the disk while the one at hand is worked on.

A checkpoint larger than the page cache is read from the disk on every pass over it. A mapped weight
is then waited for page by page, and the processor idles meanwhile: of the 190 s that the quality
gate of Mistral-7B took on 2 cores with 24 GiB, about 90.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch

from exporter.checkpoint.open import Checkpoint

AHEAD = 1 << 29  # bytes that are read ahead at most
STEP = 1 << 22  # bytes of one read


class ReadAhead:
    """`tensor` of a checkpoint, for a caller that goes through all weights in canonical order.

    Any other order is right as well, and no faster than `Checkpoint.tensor`.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._names = list(checkpoint.spec.weight_shapes())
        self._places = {name: i for i, name in enumerate(self._names)}
        self._reader = ThreadPoolExecutor(1)
        self._asked = 0  # weights up to this place were asked for in this pass
        self._buffer = bytearray(STEP)

    def __call__(self, name: str) -> torch.Tensor:
        """Return the weight, and have the ones after it read into the page cache."""
        self.ahead(name)
        return self._checkpoint.tensor(name)

    def ahead(self, name: str) -> None:
        """Have the weights after this one read into the page cache."""
        at = self._places[name]
        if at == 0:  # the embedding: a new pass begins
            self._asked = 0
        left = AHEAD
        for place, other in enumerate(self._names[at + 1 :], at + 1):
            left -= self._checkpoint.stored[other].nbytes
            if left < 0:
                break
            if place > self._asked:
                self._asked = place
                self._reader.submit(self._read, other)

    def _read(self, name: str) -> None:
        """Read a weight's bytes once, and leave them to the page cache."""
        with suppress(OSError):  # `tensor` reports it
            for where in self._checkpoint.stored[name].ranges:
                with where.path.open("rb", buffering=0) as file:
                    for offset in range(where.offset, where.offset + where.length, STEP):
                        count = min(STEP, where.offset + where.length - offset)
                        os.preadv(file.fileno(), [memoryview(self._buffer)[:count]], offset)
