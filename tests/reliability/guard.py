"""What a reader may do with any input: answer, or refuse in words. Knows no reader.

Every case runs under an alarm and a limit of address space, so that a hang or a bomb is a failure
with a name and not the end of the machine.
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

SECONDS = 30  # of one case; the slowest takes a tenth of a second on two busy cores
ADDRESS_SPACE = 1 << 30  # bytes on top of what the process has
MEMORY_FLOOR, MEMORY_FACTOR = 128 << 20, 64  # a case may hold so much, and so many times its bytes
LONGEST_MESSAGE = 1500  # characters; a value from the file is shown, not all of it


class Hang(BaseException):
    """A case ran out of time. No `except Exception` of a reader may take it for its own."""


def outcome_of(read: Callable[[], None], size: int) -> Outcome:
    """Run `read` on an input of `size` bytes: "refused" where it raises MistralcError.

    Anything else that it raises comes through. Raises AssertionError where the message is no
    message, or memory was out of proportion.
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
    """Assert that an error is one paragraph that a person can read."""
    assert len(message) >= 20, f"no explanation: {message!r}"
    assert len(message) <= LONGEST_MESSAGE, f"{len(message):,} characters: {message[:200]!r}…"
    assert "\n" not in message, f"more than one line: {message!r}"
    assert message.rstrip().endswith((".", "`")), f"no sentence: {message!r}"


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
    """Begin a new high-water mark of resident memory (proc(5), clear_refs) and return it."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmHWM")


def _status(field: str) -> int:
    """A size from /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(text.partition(f"\n{field}:")[2].split(maxsplit=1)[0]) * 1024
