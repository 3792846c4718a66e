"""Assertions about how a command ended: success, JSON output, a refusal, a usage error."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import Ended

Copy = Callable[[Path], Path]

NO_END = ("--logit-bias", "2=-100")  # bans the end-of-text token, so the output length is fixed


def succeeded(ended: Ended) -> str:
    """Assert exit status 0 and an empty standard error; return standard output."""
    assert ended.code == 0, ended.err
    assert ended.err == ""
    return ended.out


def json_output(ended: Ended) -> dict[str, Any]:
    """Assert success and return the JSON object that a command with --json prints on one line."""
    out = succeeded(ended)
    assert out.count("\n") == 1
    result: dict[str, Any] = json.loads(out)
    return result


def refused(ended: Ended, *expected: str, code: int = 1) -> None:
    """Assert exit status `code` and one paragraph of error that contains each `expected` text."""
    assert ended.code == code, ended
    assert ended.out == "", "a refused command prints no result"
    assert ended.err.startswith("mistralc: ")
    assert ended.err.endswith(".\n")
    assert ended.err.count("\n") == 1, f"expected one paragraph, got:\n{ended.err}"
    assert "Traceback" not in ended.err
    assert 40 < len(ended.err) < 700, "long enough to give a remedy, short enough to read"
    for text in expected:
        assert text in ended.err, f"{text!r} is not in: {ended.err}"


def usage_error(ended: Ended, *expected: str) -> None:
    """Assert an error of the option parser itself, which prints the usage and a framed message."""
    assert ended.code == 2, ended
    assert ended.out == ""
    assert ended.err.startswith("Usage: ")
    assert "Traceback" not in ended.err
    unframed = " ".join(ended.err.replace("│", " ").split())
    for text in expected:
        assert text in unframed, f"{text!r} is not in: {unframed}"
