"""How much memory a stretch of work took. Knows nothing about the work."""

import threading
from pathlib import Path
from types import TracebackType
from typing import Self

INTERVAL = 0.05  # seconds between two looks; an allocation that matters lives longer


class PeakMemory:
    """The most anonymous memory that the process held while the block ran: `peak`, in bytes.

    Anonymous memory is what has no file behind it. Mapped weights are not in it: the kernel takes
    their pages back when it needs them.
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
    """Anonymous memory of this process now, in bytes, as the kernel counts it (proc(5))."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
