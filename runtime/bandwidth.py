"""How fast this machine reads memory. Knows no model.

A decode step reads every weight once, so this is the speed that no backend on it can beat.
"""

from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

BYTES = 1 << 29  # many times any cache of the last level
ROUNDS = 7


def read_bandwidth(threads: int) -> float:
    """Bytes per second that `threads` threads read together: the best of `ROUNDS` passes.

    Each takes the dot product of its part of an array with itself, which computes far faster than
    memory delivers.
    """
    parts = np.array_split(np.ones(BYTES // 4, np.float32), threads)
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(ROUNDS):
            began = perf_counter()
            list(pool.map(_read, parts))
            seconds.append(perf_counter() - began)
    return BYTES / min(seconds)


def _read(part: NDArray[np.float32]) -> float:
    return float(np.dot(part, part))
