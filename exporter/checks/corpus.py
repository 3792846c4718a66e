"""Text to measure and to calibrate with, as token ids. Knows nothing about models or methods.

A corpus is documents: a text file is one, a line of a JSONL file is one, a topic of Python's own
documentation is one. Each is encoded by itself, the way the model will meet it: with a BOS at its
beginning where the checkpoint asks for one, and a chat with whatever its template writes. Windows
are cut from the documents laid end to end, so a window that begins inside a document has no BOS,
and what separates two documents is the BOS alone, if there is one.
"""

import hashlib
import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from graphs.errors import MistralcError, UsageError
from runtime.text.tokenizer import Tokenizer

Ids = NDArray[np.int64]
Part = Literal["calibration", "evaluation"]

PARTS: tuple[Part, Part] = ("calibration", "evaluation")  # of the built-in text: even, odd topics
CONTROL_SHARE = 1e-3  # of a text's characters; more control characters than that are no text
_WHITESPACE = frozenset("\t\n\v\f\r")
_CONTROL = {code: "" for code in (*range(32), 127) if chr(code) not in _WHITESPACE}


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Documents as token ids, int64 [n] each and none empty, and where they are from in words."""

    documents: tuple[Ids, ...]
    source: str

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return sum(len(ids) for ids in self.documents)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the ids and where documents end: 64 hexadecimal digits."""
        digest = hashlib.sha256()
        for ids in self.documents:
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(ids.astype("<i8").tobytes())
        return digest.hexdigest()


def read_corpus(paths: Sequence[Path], tokenizer: Tokenizer, part: Part) -> Corpus:
    """Read text files and, by the suffix `.jsonl`, files with a JSON object on each line.

    Such a line has `messages`, a chat that is rendered by the checkpoint's template, or `text`.
    Without `paths` it is `part` of Python's documentation: the even topics in the order of their
    names calibrate, the odd ones evaluate, and which they are depends on Python's version only.

    Raises MistralcError naming the file, and the line of a JSONL file, where there is no text, or
    something that is not text.
    """
    if not paths:
        return _built_in(tokenizer, part)
    documents: list[Ids] = []
    for path in paths:
        text = read_text(path)
        if path.suffix.lower() == ".jsonl":
            found = list(_encode_lines(text, path, tokenizer))
        else:
            check_text(text, str(path))
            found = [_array(tokenizer.encode(text))] if text else []
        if not found:
            raise MistralcError(
                f"{path} is empty; text is expected, or lines of JSON in a .jsonl file. Check the "
                "path and how the file was made."
            )
        documents += found
    return Corpus(documents=tuple(documents), source=", ".join(path.name for path in paths))


def windows(corpus: Corpus, length: int, limit: int | None = None) -> Ids:
    """Lay the documents end to end and cut them into windows [n, length]; the rest is dropped.

    At most `limit` windows are made, from the front. Raises UsageError where the corpus does not
    fill one, or a window would leave nothing to predict.
    """
    if length < 2:
        raise UsageError(
            f"A window of {length} tokens was asked for; the least is 2, a token and the one that "
            "is predicted after it. Give a larger --length."
        )
    if limit is not None and limit < 1:
        raise UsageError(f"{limit} windows were asked for; give a limit from 1 up, or none.")
    count = corpus.tokens // length
    if count < 1:
        raise UsageError(
            f"The text ({corpus.source}) is {corpus.tokens:,} tokens long; at least one window of "
            f"{length:,} is expected. Give more text or a smaller --length."
        )
    count = count if limit is None else min(count, limit)
    wanted, taken = count * length, []
    for ids in corpus.documents:
        taken.append(ids[:wanted])
        wanted -= len(taken[-1])
        if not wanted:
            break
    return np.concatenate(taken).reshape(count, length)


def check_text(text: str, where: str) -> None:
    """Raise MistralcError where `text` is data that happens to be valid UTF-8.

    One NUL is enough, and so is more than one control character in a thousand; a stray one, as
    terminals and old editors leave behind, is not.
    """
    controls = len(text) - len(text.translate(_CONTROL))
    if controls > CONTROL_SHARE * len(text) or "\0" in text:
        at = next(i for i, character in enumerate(text) if ord(character) in _CONTROL)
        raise MistralcError(
            f"{where} holds {controls:,} control characters among {len(text):,}, the first of them "
            f"U+{ord(text[at]):04X} at character {at:,}; text is expected, and this looks like "
            "binary data. Give a text file, or take the control characters out."
        )


def objects(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of JSON lines, each after its file and line, to be named in errors.

    Blank lines are passed over. Raises MistralcError at the first line that is something else.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise MistralcError(
                f"{where} is not JSON ({error}); one JSON object on each line is expected. Correct "
                "the line, or name the file .txt if it is plain text."
            ) from error
        if not isinstance(value, dict):
            raise MistralcError(
                f"{where} is a JSON {type(value).__name__}; an object is expected. Correct the "
                "line."
            )
        yield where, value


def read_text(path: Path) -> str:
    """All of a file in UTF-8, a byte-order mark left out. Raises MistralcError naming it."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MistralcError(
            f"{path} is not UTF-8 (byte {error.start:,} is 0x{error.object[error.start]:02x}); "
            "text in UTF-8 is expected. Convert it first, for example with iconv; if it is not "
            "text at all, give another file."
        ) from error
    except OSError as error:
        raise MistralcError(
            f"{path} could not be read ({error}); a file of text is expected. Check the path."
        ) from error


def _built_in(tokenizer: Tokenizer, part: Part) -> Corpus:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise MistralcError(
            "This Python was installed without its documentation (pydoc_data), the text that is "
            "used where none is given. Give one with --text FILE."
        ) from error
    names = sorted(topics)[PARTS.index(part) :: 2]
    return Corpus(
        documents=tuple(_array(tokenizer.encode(topics[name])) for name in names),
        source=f"the built-in default: {len(names)} topics of the documentation of Python "
        f"{platform.python_version()} (pydoc_data) that are for {part}",
    )


def _encode_lines(text: str, path: Path, tokenizer: Tokenizer) -> Iterator[Ids]:
    for where, line in objects(text, path):
        try:
            ids = _encode_line(line, tokenizer)
        except MistralcError as error:  # the tokenizer and the template know of no file
            raise type(error)(f"{where}: {error}") from error
        if ids:
            yield _array(ids)


def _encode_line(line: dict[str, Any], tokenizer: Tokenizer) -> list[int]:
    messages, text = line.get("messages"), line.get("text")
    if messages is None:
        if not isinstance(text, str):
            raise MistralcError(
                f"The fields are {', '.join(line) or 'none at all'}; `text`, a string, or "
                "`messages`, a list, is expected. Rename the field that holds the text."
            )
        check_text(text, "The text")
        return tokenizer.encode(text) if text else []
    good = isinstance(messages, list) and messages
    if not good or not all(isinstance(message, dict) for message in messages):
        raise MistralcError(
            f"`messages` is {json.dumps(messages)[:40]}; a list of objects with `role` and "
            "`content` is expected, at least one. Correct the line."
        )
    for content in (message.get("content") for message in messages):
        if isinstance(content, str):
            check_text(content, "A message")
    return tokenizer.encode_chat(messages, add_generation_prompt=False)


def _array(ids: Sequence[int]) -> Ids:
    return np.asarray(ids, np.int64)
