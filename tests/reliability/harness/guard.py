"""Run a reader on one input: it must succeed or raise a readable MistralcError.

Every case runs under an alarm and an address space limit, so a hang or a decompression bomb fails
that case instead of taking the machine down.
"""

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Literal, NoReturn

from graphs.errors import MistralcError

Outcome = Literal["read", "refused"]

SECONDS = 30  # per case; the slowest takes 0.1 s on two busy cores
ADDRESS_SPACE = 1 << 30  # bytes beyond what the process already uses
MEMORY_FLOOR, MEMORY_FACTOR = 128 << 20, 64  # a case may use FLOOR + FACTOR * its size, in bytes
LONGEST_MESSAGE = 1500  # characters; long values from the file are truncated


class Hang(BaseException):
    """A case exceeded SECONDS. A BaseException, so `except Exception` cannot swallow it."""


def outcome_of(read: Callable[[], None], size: int) -> Outcome:
    """Run `read` on an input of `size` bytes; "refused" means that it raised MistralcError.

    Any other exception propagates. Raises AssertionError if the error message is unreadable or if
    the memory used was out of proportion to `size`.
    """
    before = _reset_peak()
    with _limits():
        try:
            read()
            outcome: Outcome = "read"
        except MistralcError as error:
            check_message(str(error))
            outcome = "refused"
    grown = _status("VmHWM") - before
    allowed = MEMORY_FLOOR + MEMORY_FACTOR * size
    assert grown <= allowed, f"{size:,} bytes of input took {grown:,} bytes of memory"
    return outcome


def check_message(message: str) -> None:
    """Assert that an error message is one readable paragraph."""
    assert len(message) >= 20, f"no explanation: {message!r}"
    assert len(message) <= LONGEST_MESSAGE, f"{len(message):,} characters: {message[:200]!r}…"
    assert "\n" not in message, f"more than one line: {message!r}"
    assert message.rstrip().endswith((".", "`")), f"does not end like a sentence: {message!r}"


@contextmanager
def _limits() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    old = signal.signal(signal.SIGALRM, _stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + ADDRESS_SPACE, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def _stop(_number: int, _frame: FrameType | None) -> NoReturn:
    raise Hang(f"a case took more than {SECONDS} seconds")


def _reset_peak() -> int:
    """Reset peak resident memory (proc(5), clear_refs) and return it, in bytes."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmHWM")


def _status(field: str) -> int:
    """A size from /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(text.partition(f"\n{field}:")[2].split(maxsplit=1)[0]) * 1024
