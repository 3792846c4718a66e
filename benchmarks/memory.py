"""Measure the peak anonymous memory of this process during a block of code.

with PeakMemory() as memory:
    work()
print(memory.peak)  # bytes
"""

import threading
from pathlib import Path
from types import TracebackType
from typing import Self

INTERVAL = 0.05  # seconds between samples; shorter allocations are missed


class PeakMemory:
    """Records the peak anonymous memory of the process during the block: `peak`, in bytes.

    Anonymous memory has no file behind it. Mapped weights do not count: the kernel can drop their
    pages at any time.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous_bytes())

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            self.peak = max(self.peak, anonymous_bytes())


def anonymous_bytes() -> int:
    """Current anonymous memory of this process in bytes (RssAnon, proc(5))."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
