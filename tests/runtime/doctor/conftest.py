"""Run `mistralc doctor --json`."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import Command

Report = tuple[int, dict[str, dict[str, Any]]]


@pytest.fixture
def doctor(mistralc: Command) -> Callable[..., Report]:
    """`doctor(*arguments)` returns the exit status of the command and its checks by name."""

    def run(*arguments: object) -> Report:
        ended = mistralc("doctor", *arguments, "--json")
        assert ended.err == ""
        result = json.loads(ended.out)
        assert result["ok"] is (ended.code == 0)
        return ended.code, {check["name"]: check for check in result["checks"]}

    return run
