"""How much memory a stretch of work took. Knows nothing about the work."""

import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

INTERVAL = 0.05  # seconds between two looks; an allocation that matters lives longer
CHILDREN = 10  # looks between two searches for child processes, which read all of /proc


class PeakMemory:
    """The most anonymous memory held while the block ran, in bytes.

    `peak` is of this process, `children` of all processes that it started, together. Anonymous
    memory is what has no file behind it. Mapped weights are not in it: the kernel takes their pages
    back when it needs them.
    """

    def __init__(self) -> None:
        self.peak = self.children = 0
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
        looks, children = 0, []
        while not self._done.wait(INTERVAL):
            if looks % CHILDREN == 0:
                children = psutil.Process().children(recursive=True)
            looks += 1
            self.peak = max(self.peak, anonymous_bytes())
            self.children = max(self.children, sum(anonymous_bytes(one.pid) for one in children))


def anonymous_bytes(pid: int | str = "self") -> int:
    """Anonymous memory of a process now, in bytes, as the kernel counts it (proc(5)).

    0 if the process has ended.
    """
    with suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0
