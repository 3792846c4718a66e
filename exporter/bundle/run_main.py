"""The `__main__.py` of `run.pyz`: import `runtime` and `graphs` from the archive and nowhere else.

Another module on the host may have one of these names: an installed package, a development
installation with its own finder, a file in the current directory or on PYTHONPATH, or a module that
a `.pth` file imported before this program began. In this process both names mean the archive.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

OURS = ("graphs", "runtime")
VERSION = "?"  # replaced by the version of the mistralc that writes the archive


class ArchiveFinder:
    """Finds our packages in the archive; reports them missing instead of looking elsewhere."""

    def __init__(self, archive: str) -> None:
        self.archive = archive

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a module of our packages; None for other names. The interface of `importlib`."""
        if name.partition(".")[0] not in OURS:
            return None
        spec = PathFinder.find_spec(name, [self.archive] if path is None else path, target)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r} in {self.archive}", name=name)
        return spec


def use(archive: str) -> None:
    """Make the archive the only source of our packages in this process."""
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
