"""The errors that docs/troubleshooting.md explains are errors that the code raises."""

import re

import pytest

from tests.support.documents import DOCS
from tests.support.messages import FILLED, messages

ROW = re.compile(r"^\| `(.+?)` \| .+ \| .+ \|$", re.MULTILINE)
QUOTED = ROW.findall((DOCS / "troubleshooting.md").read_text(encoding="utf-8"))


def begins(quoted: str, message: str) -> bool:
    """Whether a message of the code begins as it is quoted, `…` standing for anything."""
    parts = quoted.replace("`", "").split("…")
    pattern = ".*?".join(map(re.escape, parts))
    return re.match(pattern, message.replace("`", ""), re.DOTALL) is not None


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_quoted_error_is_one_that_the_code_raises(quoted: str) -> None:
    assert any(begins(quoted, message) for message in messages()), "no message begins like this"


def test_a_quoted_error_says_enough_to_be_told_from_others() -> None:
    vague = [q for q in QUOTED if sum(begins(q, message) for message in messages()) > 4]
    assert not vague


def test_the_test_can_tell() -> None:
    assert begins("There is … at …", f"There is no bundle at {FILLED}. Make one")
    assert not begins("There is … at …", "A bundle: There is no bundle at x")


def test_every_row_of_the_tables_is_read() -> None:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    assert len(QUOTED) == len([row for row in rows if not row.startswith("| message")]) > 70
