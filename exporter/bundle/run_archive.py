"""Write `run.pyz`, the program inside a bundle that runs the bundle. Knows nothing about models.

A zip archive that Python runs (PEP 441). It holds the modules of `runtime` and `graphs` that its
entry points import, so neither the graph passes nor what needs Ray. Comments and module docstrings
(40 KB) are left out; docstrings of functions and classes are help texts, and stay. Entries are
sorted by name, have one time and one permission, and are not compressed, because versions of zlib
write different bytes.
"""

import ast
import io
import tokenize
import zipfile
from collections.abc import Iterator
from pathlib import Path

import graphs
import runtime
from exporter.bundle import run_main
from runtime.system.release import mistralc_version

NAME = "run.pyz"
ENTRY_POINTS = (  # by `run_main.py` and by `triton_model.py`
    "runtime.run_pyz",
    "runtime.cli.plain_typer",
    "runtime.serve.triton_backend",
)

EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time of the zip format
MODE = 0o100644  # a regular file that everyone may read
UNIX = 3  # the system whose permissions these are


def write_run_archive(directory: Path) -> None:
    """Write `run.pyz` into `directory`; the same sources give the same bytes."""
    with zipfile.ZipFile(directory / NAME, "w", zipfile.ZIP_STORED) as archive:
        for name, data in sorted(contents().items()):
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.create_system, entry.external_attr = UNIX, MODE << 16
            archive.writestr(entry, data)


def contents() -> dict[str, bytes]:
    """Return every file of the archive by its name there."""
    main = Path(str(run_main.__file__)).read_text(encoding="utf-8")
    main = main.replace('VERSION = "?"', f"VERSION = {mistralc_version()!r}")
    sources = {"__main__.py": main, **_needed_modules()}
    files = {name: strip_remarks(source).encode() for name, source in sources.items()}
    return files | _data_files({name.rpartition("/")[0] for name in files})


def strip_remarks(source: str) -> str:
    """Remove comments and the module docstring; all code stays on its line."""
    lines = source.split("\n")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip()
    tree = ast.parse(source)
    if ast.get_docstring(tree) is not None:
        first, last = tree.body[0].lineno, tree.body[0].end_lineno or 0
        lines[first - 1 : last] = [""] * (last + 1 - first)
    return "\n".join(lines)


def _needed_modules() -> dict[str, str]:
    """Return the sources of the entry points, of what they import, and of the packages around."""
    found: dict[str, str] = {}
    waiting = list(ENTRY_POINTS)
    while waiting:
        module = waiting.pop()
        name, path = _source_file(module)
        if name in found or not path.is_file():  # imported before, or a name inside a module
            continue
        found[name] = path.read_text(encoding="utf-8")
        waiting += [module.rpartition(".")[0], *_imports(found[name])]
    return found


def _source_file(module: str) -> tuple[str, Path]:
    """Return a module's name in the archive, and the file that it is read from."""
    roots = {"graphs": graphs, "runtime": runtime}
    package, *parts = module.split(".")
    if package not in roots:
        return "", Path()
    root = Path(str(roots[package].__file__)).parent
    folder = root.joinpath(*parts)
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    return f"{package}/{path.relative_to(root).as_posix()}", path


def _imports(source: str) -> Iterator[str]:
    """Yield every name that is imported anywhere in a source file, modules among them."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def _data_files(packages: set[str]) -> dict[str, bytes]:
    """Return the files of these packages that are not Python, such as the chat page."""
    root = Path(str(runtime.__file__)).parent
    found = {}
    for path in sorted(root.rglob("*")):
        name = f"runtime/{path.relative_to(root).as_posix()}"
        if path.is_file() and name.rpartition("/")[0] in packages and not _is_leftover(path.name):
            found[name] = path.read_bytes()
    return found


def _is_leftover(name: str) -> bool:
    """Whether a file is not part of a package: Python source or cache, hidden, an editor's copy."""
    return name.startswith(".") or name.endswith((".py", ".pyc", "~"))
