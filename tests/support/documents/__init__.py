"""Read documents: their commands, and the parts between two marks, which a command writes."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[3]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
DOCUMENTS = (README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md")))

_BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`]+)`")
_SHELL = ("console", "bash", "sh")


class Shown(NamedTuple):
    """A command of a code block, without its comment, and the output shown below it."""

    command: str
    output: str = ""


def block_commands(text: str) -> list[Shown]:
    """The commands of a document's code blocks, in their order.

    In a block of any kind, a line that begins with `$ ` is a command; in `bash` blocks every line
    is.
    """
    found: list[Shown] = []
    for indent, language, block in _BLOCK.findall(text):
        lines = re.sub(rf"^{indent}", "", block, flags=re.MULTILINE).replace("\\\n", " ")
        if re.search(r"^\$ ", lines, re.MULTILINE):
            for entry in re.split(r"^\$ ", lines, flags=re.MULTILINE)[1:]:
                command, _, output = entry.partition("\n")
                found.append(Shown(_without_comment(command), output))
        elif language in _SHELL:
            found += [Shown(_without_comment(line)) for line in lines.splitlines() if line.strip()]
    return found


def inline_commands(text: str, programs: tuple[str, ...]) -> Iterator[str]:
    """The code spans outside code blocks that begin with one of `programs` and say more."""
    begins = re.compile(rf"(?:\.venv/bin/)?(?:{'|'.join(map(re.escape, programs))})\s+\S")
    for span in _INLINE.findall(_BLOCK.sub("", text)):
        if begins.match(span):
            yield " ".join(span.split())


def _without_comment(line: str) -> str:
    return re.split(r"\s# ", line, maxsplit=1)[0].strip()


def between(document: Path, begin: str, end: str) -> str:
    """The text between the document's two marks. Raises ValueError if one is missing."""
    _, rest = document.read_text(encoding="utf-8").split(begin, 1)
    found, _ = rest.split(end, 1)
    return found.strip("\n")


def replace_between(document: Path, begin: str, end: str, text: str) -> None:
    """Put `text` between the document's two marks. Raises ValueError if one is missing."""
    before, rest = document.read_text(encoding="utf-8").split(begin, 1)
    _, after = rest.split(end, 1)
    document.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")
