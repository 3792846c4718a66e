"""Writing `run.pyz`: the program that runs a bundle, inside the bundle. Knows no model.

A zip archive that Python runs (PEP 441), with all of `runtime` and what it needs of `graphs`;
passes, which need onnx_ir, stay behind. Entries are in the order of their names, with one time and
one permission, and not compressed, for zlib's versions differ in what they write.
"""

import ast
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import graphs
import runtime
from exporter.bundle import run_main

NAME = "run.pyz"

EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip archive can say
MODE = 0o100644  # a regular file that everyone may read
WITH_DOCSTRINGS = ("runtime/cli/", "runtime/serve/")
UNIX = 3  # the system that the permissions are of


def write_run_archive(directory: Path) -> None:
    """Write `run.pyz` into `directory`; the same sources give the same bytes."""
    with zipfile.ZipFile(directory / NAME, "w", zipfile.ZIP_STORED) as archive:
        for name, data in sorted(contents().items()):
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.create_system, entry.external_attr = UNIX, MODE << 16
            archive.writestr(entry, data)


def contents() -> dict[str, bytes]:
    """Every file of the archive by its name in it."""
    main = Path(str(run_main.__file__)).read_text(encoding="utf-8")
    found = {"__main__.py": main.replace('VERSION = "?"', f"VERSION = {version('mistralc')!r}")}
    files: dict[str, bytes] = {name: text.encode() for name, text in found.items()}
    root = Path(str(runtime.__file__)).parent
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        if path.is_file() and not any(_leftover(part) for part in parts):
            files["/".join(("runtime", *parts))] = path.read_bytes()
    files |= _needed_graphs(files)
    return {name: _stripped(name, data) for name, data in files.items()}


def _stripped(name: str, source: bytes) -> bytes:
    """A module without its docstrings, which nobody reads in an archive; other files as they are.

    The command line shows its docstrings as help, and the server in its OpenAPI schema.
    """
    if not name.endswith(".py") or name.startswith(WITH_DOCSTRINGS):
        return source
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
            continue
        if isinstance(node.value.value, str) and node.end_lineno is not None:
            first, last = node.lineno - 1, node.end_lineno - 1
            begin, end = lines[first][: node.col_offset], lines[last][node.end_col_offset :]
            # Blank lines keep the line numbers that a traceback shows.
            lines[first : last + 1] = [begin + b'""' + end, *[b"\n"] * (last - first)]
    return b"".join(lines)


def _leftover(name: str) -> bool:
    """Whether a file or folder is no part of a package: a cache, hidden, an editor's copy."""
    return name.startswith(".") or name.endswith((".pyc", "~")) or name == "__pycache__"


def _needed_graphs(files: dict[str, bytes]) -> dict[str, bytes]:
    """The modules of `graphs` that `files` import, and those that these import."""
    root = Path(str(graphs.__file__)).parent
    found = {"graphs/__init__.py": (root / "__init__.py").read_bytes()}
    waiting = [data for name, data in files.items() if name.endswith(".py")]
    while waiting:
        for module in _imported_graphs(waiting.pop()):
            name, path = f"graphs/{module}.py", root / f"{module}.py"
            if name not in found and path.is_file():
                found[name] = path.read_bytes()
                waiting.append(found[name])
    return found


def _imported_graphs(source: bytes) -> Iterator[str]:
    """Names that may be modules of `graphs`, from every import in a source file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            package, _, module = node.module.partition(".")
            if package == "graphs":
                yield from [module] if module else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (
                n.name.partition(".")[2] for n in node.names if n.name.startswith("graphs.")
            )
