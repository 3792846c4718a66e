"""Compare the tokenizer of every layout of a checkpoint's files with the program that defines it.

    python -m benchmarks.checkpoints.text_layouts [--write]

Makes the layouts that the tests use (`tests/support/text_layouts.py`), reads each as an export
does, and compares the ids of 320 strings and 30 chats. Prints the table, and writes it into
docs/text.md with --write. GGUF files are compared with llama.cpp if `llama-cpp-python` is
installed. Takes 20 s. Ends with status 1 if any id differs.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from exporter.checks.text_agreement import examine
from exporter.tokenizer.read import read_tokenizer
from graphs.errors import MistralcError
from tests.support import text_vocabularies
from tests.support.documents import DOCS, replace_between
from tests.support.text_layouts import LAYOUTS
from tests.support.text_vocabularies import PRE_TOKENIZERS, Vocabularies, plain

MARKS = "<!-- written by benchmarks/checkpoints/text_layouts.py -->", "<!-- end -->"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One layout: how many strings and chats have the same ids as with another program."""

    layout: str
    what: str
    compared_with: str
    strings: tuple[int, int]  # equal, of
    chats: int  # all equal: a chat that differs is an error

    @property
    def agrees(self) -> bool:
        """Whether every id is equal, if anything was compared."""
        return self.strings[0] == self.strings[1]


def rows(folder: Path) -> Iterator[Row]:
    """Make every layout below `folder` and compare it."""
    vocabularies = text_vocabularies.train(folder)
    for name, write in LAYOUTS.items():
        directory = folder / name
        directory.mkdir()
        write(vocabularies, directory)
        yield compare(name, (write.__doc__ or "").strip().rstrip("."), directory)
    for name, path in _gguf_files(vocabularies, folder):
        yield compare(name, "user-defined ChatML tokens", path)


def compare(name: str, what: str, source: Path) -> Row:
    """Compare one layout with the programs that read it."""
    ours = read_tokenizer(source).open()
    found = examine(source, ours)
    if not found.agreed:
        nothing = f"nothing: {'; '.join(found.missing)}"
        return Row(layout=name, what=what, compared_with=nothing, strings=(0, 0), chats=0)
    programs = [one.reference for one in found.agreed]
    texts = plain()
    equal = sum(
        all(ours.encode(text, add_bos=one.with_bos) == list(one.encode(text)) for one in programs)
        for text in texts
    )
    return Row(
        layout=name, what=what, compared_with=", ".join(one.name for one in programs),
        strings=(equal, len(texts)), chats=max(one.chats for one in found.agreed),
    )  # fmt: skip


def _gguf_files(vocabularies: Vocabularies, folder: Path) -> Iterator[tuple[str, Path]]:
    path = folder / "sentencepiece.gguf"
    text_vocabularies.write_sentencepiece_gguf(vocabularies, path)
    yield "GGUF llama", path
    for pre in PRE_TOKENIZERS:
        path = folder / f"{pre}.gguf"
        text_vocabularies.write_bpe_gguf(vocabularies, path, pre)
        yield f"GGUF {pre}", path


def table(found: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| layout | what it is | compared with | strings | chats |",
             "| --- | --- | --- | ---: | ---: |"]  # fmt: skip
    for row in found:
        equal, count = row.strings
        counts = f"{equal} of {count} | {row.chats}" if count else "- | -"
        what, program = row.what.replace("|", "\\|"), row.compared_with
        lines.append(f"| {row.layout} | {what} | {program} | {counts} |")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the table into docs/text.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = list(rows(Path(folder)))
        except MistralcError as error:
            sys.exit(f"text_layouts: {error}")
    print(table(found))
    if arguments.write:
        replace_between(DOCS / "text.md", *MARKS, table(found))
    sys.exit(0 if all(row.agrees for row in found) else 1)


if __name__ == "__main__":
    main()
