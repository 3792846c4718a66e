"""Progress bars on a terminal, nothing elsewhere. Knows nothing about the work in progress."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Advance = Callable[[int], None]
Stage = Callable[[str, int | None], AbstractContextManager[Advance]]
"""`with stage("Hashing", total_bytes) as advance: advance(n)`; a total of None shows a spinner."""


@contextmanager
def silent(title: str, total: int | None = None) -> Iterator[Advance]:  # noqa: ARG001
    """Show nothing."""
    yield lambda _count: None


@contextmanager
def bar(title: str, total: int | None = None) -> Iterator[Advance]:
    """Show a bar with the time left on standard error while the block runs, then erase it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)


def stage_for(*, quiet: bool) -> Stage:
    """Return `bar` on a terminal if rich is installed and `quiet` is false, otherwise `silent`."""
    can_show = sys.stderr.isatty() and importlib.util.find_spec("rich") is not None
    return bar if can_show and not quiet else silent
