"""How fast this machine reads memory. Knows no model.

A decode step reads every weight once, so this is the speed that no backend on it can beat.
"""

from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

BYTES = 1 << 29  # many times any cache of the last level
PASSES = 7


class Memory:
    """A piece of it to read, which stays allocated: measure it beside what it is compared with."""

    def __init__(self, threads: int) -> None:
        self._parts = np.array_split(np.ones(BYTES // 4, np.float32), threads)

    def read_bandwidth(self) -> float:
        """Bytes per second that the threads read together: the best of `PASSES`.

        Each takes the dot product of its part of an array with itself, which computes far faster
        than memory delivers.
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
