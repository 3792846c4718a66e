"""What a target of fuzzing is: small real inputs, ways to damage them, a reader. Knows no reader.

A target's `prepare` gets an empty folder and returns the strategy of its cases and what reads one.
Reading raises MistralcError where it refuses, returns where it read something that keeps its
contract, and anything else is a fault. `registry.py` has the list.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

Files = Mapping[str, bytes]  # contents by path relative to the target's folder


def total_size(case: Any) -> int:
    """Bytes of a case that is files."""
    return sum(map(len, case.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A target that is ready: `read` takes what `cases` draws, `size` says how many bytes it is.

    `good` is a case that has to be read; None where there is none that is allowed.
    """

    cases: st.SearchStrategy[Any]
    read: Callable[[Any], None]
    size: Callable[[Any], int] = total_size
    good: Any = field(default_factory=dict)  # no file is changed


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One reader under test. `name` is what the table calls it."""

    name: str
    prepare: Callable[[Path], Prepared]
    examples: int = field(default=60)  # in the test suite; a command runs as many as it is told


class Folder:
    """A folder of good files; each case changes some of them, and the next begins anew."""

    def __init__(self, path: Path) -> None:
        self.path = path
        files = (file for file in path.rglob("*") if file.is_file())
        self.good = {file.relative_to(path).as_posix(): file.read_bytes() for file in files}
        self._changed: set[str] = set()

    def put(self, case: Files) -> None:
        """Write the files of `case`, and the good ones where the last case changed them."""
        for name in self._changed - case.keys():
            if name in self.good:
                (self.path / name).write_bytes(self.good[name])
            else:
                (self.path / name).unlink()
        for name, data in case.items():
            (self.path / name).write_bytes(data)
        self._changed = set(case)

    def reading(self, read: Callable[[Path], None]) -> Callable[[Files], None]:
        """What puts a case and reads the folder."""

        def run(case: Files) -> None:
            self.put(case)
            read(self.path)

        return run
