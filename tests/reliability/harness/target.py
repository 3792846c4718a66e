"""A fuzzing target: small valid inputs, a strategy that damages them, and a reader.

`prepare` gets an empty folder and returns the strategy and the reader. The reader returns if the
input kept its contract and raises MistralcError to refuse it; anything else is a fault. All
targets are listed in `registry.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

Files = Mapping[str, bytes]  # contents by path, relative to the target's folder


def total_size(case: Any) -> int:
    """Size in bytes of a case that consists of files."""
    return sum(map(len, case.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A prepared target: `read` takes a case drawn from `cases`; `size` returns its bytes.

    `good` is a case that must be accepted; None if the target must refuse every case.
    """

    cases: st.SearchStrategy[Any]
    read: Callable[[Any], None]
    size: Callable[[Any], int] = total_size
    good: Any = field(default_factory=dict)  # default: no file is changed


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One reader under test; `name` identifies its row in docs/reliability.md."""

    name: str
    prepare: Callable[[Path], Prepared]
    examples: int = field(default=60)  # in the test suite; the command line sets its own number


class Folder:
    """A folder of valid files; each case overwrites some, and the next restores them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        files = (file for file in path.rglob("*") if file.is_file())
        self.good = {file.relative_to(path).as_posix(): file.read_bytes() for file in files}
        self._changed: set[str] = set()

    def write(self, case: Files) -> None:
        """Write the files of `case`; restore the other files that the last case changed."""
        for name in self._changed - case.keys():
            if name in self.good:
                (self.path / name).write_bytes(self.good[name])
            else:
                (self.path / name).unlink()
        for name, data in case.items():
            (self.path / name).write_bytes(data)
        self._changed = set(case)

    def reader(self, read: Callable[[Path], None]) -> Callable[[Files], None]:
        """Return a function that writes a case and then calls `read` on the folder."""

        def run(case: Files) -> None:
            self.write(case)
            read(self.path)

        return run
