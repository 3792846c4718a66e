"""Measure how fast this machine reads memory. Knows no model.

A decode step reads every weight once, so no backend can decode faster than memory is read.
"""

from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

BYTES = 1 << 29  # many times any last-level cache
PASSES = 7


class Memory:
    """A buffer to read. It stays allocated, so that it can be measured between other runs."""

    def __init__(self, threads: int) -> None:
        self._parts = np.array_split(np.ones(BYTES // 4, np.float32), threads)

    def read_bandwidth(self) -> float:
        """Return the bytes per second that all threads read together: the best of `PASSES`.

        Each thread takes the dot product of its part of the buffer with itself, which is limited
        by memory and not by arithmetic.
        """
        seconds = []
        with ThreadPoolExecutor(len(self._parts)) as pool:
            for _ in range(PASSES):
                began = perf_counter()
                list(pool.map(_read, self._parts))
                seconds.append(perf_counter() - began)
        return BYTES / min(seconds)


def _read(part: NDArray[np.float32]) -> float:
    return float(np.dot(part, part))
