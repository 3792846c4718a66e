"""The `__main__.py` of `run.pyz`, where it is copied. Knows where its packages are, and no more.

The name `runtime` or `graphs` may be taken on a host: by an installed package, a development
installation with a finder of its own, a file in the current directory or on PYTHONPATH, or by a
`.pth` file that has imported it before this program began. In this process both names mean the
archive, wherever else they may be found.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

OURS = ("graphs", "runtime")
VERSION = "?"  # of the mistralc that wrote the archive, which puts it here


class ArchiveFinder:
    """Finds our packages in the archive, and reports them missing rather than look elsewhere."""

    def __init__(self, archive: str) -> None:
        self.archive = archive

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """As `importlib` asks; None for names that are not ours."""
        if name.partition(".")[0] not in OURS:
            return None
        spec = PathFinder.find_spec(name, [self.archive] if path is None else path, target)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r} in {self.archive}", name=name)
        return spec


def use(archive: str) -> None:
    """Make the archive the only place of our packages in this process."""
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        del sys.modules[name]
    sys.meta_path.insert(0, ArchiveFinder(archive))
    if importlib.util.find_spec("typer") is None:
        sys.modules["typer"] = importlib.import_module("runtime.cli.plain_typer")


def main(archive: str) -> None:
    """Run the archive's command line."""
    use(archive)
    importlib.import_module("runtime.run_pyz").main(VERSION)


if __name__ == "__main__":
    main(str(Path(__file__).parent.absolute()))
