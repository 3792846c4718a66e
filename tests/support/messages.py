"""Collect the error messages of the source code. Knows nothing about documents."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILLED = "\0"  # placeholder for interpolated values


@cache
def messages() -> tuple[str, ...]:
    """The text of every MistralcError and UsageError, with FILLED for interpolated values."""
    paths = [ROOT / "mistralc.py"]
    for package in ("calib", "exporter", "graphs", "runtime"):
        paths += sorted((ROOT / package).rglob("*.py"))
    found = []
    for path in paths:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        calls = (node for node in nodes if isinstance(node, ast.Call) and node.args)
        found += [_text(call.args[0]) for call in calls if _raises(call.func)]
    return tuple(found)


def _raises(function: ast.expr) -> bool:
    return isinstance(function, ast.Name) and function.id in ("MistralcError", "UsageError")


def _text(node: ast.expr) -> str:
    match node:
        case ast.Constant():
            return str(node.value)
        case ast.JoinedStr():
            return "".join(map(_text, node.values))
        case ast.BinOp():
            return _text(node.left) + _text(node.right)
        case _:
            return FILLED
