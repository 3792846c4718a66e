"""Token ids of text for measuring and calibrating.

A corpus consists of documents: a text file, a line of a JSONL file, or a topic of Python's own
documentation. Each is encoded separately and as the model meets it in use: with a BOS if the
checkpoint asks for one, and a chat by the chat template. Windows are cut from the concatenated
documents, so a window that begins inside a document has no BOS, and only the BOS, if there is one,
separates two documents.
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
CONTROL_SHARE = 1e-3  # of the characters; a file with more control characters is not text
_WHITESPACE = frozenset("\t\n\v\f\r")
_CONTROL = {code: "" for code in (*range(32), 127) if chr(code) not in _WHITESPACE}


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Non-empty documents as token ids, int64 [n] each, and a description of their source."""

    documents: tuple[Ids, ...]
    source: str

    @property
    def tokens(self) -> int:
        """Number of tokens of all documents."""
        return sum(len(ids) for ids in self.documents)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the ids and the ends of documents: 64 hexadecimal digits."""
        digest = hashlib.sha256()
        for ids in self.documents:
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(ids.astype("<i8").tobytes())
        return digest.hexdigest()


def read_corpus(paths: Sequence[Path], tokenizer: Tokenizer, part: Part) -> Corpus:
    """Read text files and `.jsonl` files, which have a JSON object on each line.

    Such an object has `text`, or `messages`: a chat for the checkpoint's template. Without `paths`,
    `part` of Python's documentation is read: of the topics in order of their names, the even ones
    are for calibration, the odd ones for evaluation. They depend on Python's version only.

    Raises MistralcError naming the file, and the line of a JSONL file, if it has no text or is not
    text.
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
                f"{path} is empty; expected text, or lines of JSON in a .jsonl file. Check the "
                "path and how the file was made."
            )
        documents += found
    return Corpus(documents=tuple(documents), source=", ".join(path.name for path in paths))


def windows(corpus: Corpus, length: int, limit: int | None = None) -> Ids:
    """Concatenate the documents and cut them into windows [n, length]; the rest is dropped.

    Returns at most `limit` windows, from the front. Raises UsageError if the corpus does not fill
    one, or if a window has nothing to predict.
    """
    if length < 2:
        raise UsageError(
            f"A window of {length} tokens was asked for; expected at least 2: a token and the one "
            "predicted after it. Give a larger --length."
        )
    if limit is not None and limit < 1:
        raise UsageError(f"{limit} windows were asked for; give a limit of at least 1, or omit it.")
    count = corpus.tokens // length
    if count < 1:
        raise UsageError(
            f"The text ({corpus.source}) is {corpus.tokens:,} tokens long; expected at least one "
            f"window of {length:,}. Give more text or a smaller --length."
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
    """Raise MistralcError if `text` is binary data that happens to be valid UTF-8.

    One NUL is enough, or more than one control character in a thousand. A stray one, as terminals
    and old editors leave behind, is accepted.
    """
    controls = len(text) - len(text.translate(_CONTROL))
    if controls > CONTROL_SHARE * len(text) or "\0" in text:
        at = next(i for i, character in enumerate(text) if ord(character) in _CONTROL)
        raise MistralcError(
            f"{where} holds {controls:,} control characters among {len(text):,}, the first of them "
            f"U+{ord(text[at]):04X} at character {at:,}; expected text, but this looks "
            "like binary data. Give a text file, or remove the control characters."
        )


def objects(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the object of each JSON line, with the file and line to name in errors.

    Skips blank lines. Raises MistralcError at the first line that is not a JSON object.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise MistralcError(
                f"{where} is not JSON ({error}); expected one JSON object on each line. Correct "
                "the line, or name the file .txt if it is plain text."
            ) from error
        if not isinstance(value, dict):
            raise MistralcError(
                f"{where} is a JSON {type(value).__name__}; expected an object. Correct the line."
            )
        yield where, value


def read_text(path: Path) -> str:
    """Read a UTF-8 file without its byte-order mark. Raises MistralcError naming it."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MistralcError(
            f"{path} is not UTF-8 (byte {error.start:,} is 0x{error.object[error.start]:02x}); "
            "expected text in UTF-8. Convert it first, for example with iconv; if it is not text, "
            "give another file."
        ) from error
    except OSError as error:
        raise MistralcError(
            f"{path} could not be read ({error}); expected a text file. Check the path."
        ) from error


def _built_in(tokenizer: Tokenizer, part: Part) -> Corpus:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise MistralcError(
            "This Python was installed without its documentation (pydoc_data), the default "
            "text. Give another with --text FILE."
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
        except MistralcError as error:  # the tokenizer and the template do not know the file
            raise type(error)(f"{where}: {error}") from error
        if ids:
            yield _array(ids)


def _encode_line(line: dict[str, Any], tokenizer: Tokenizer) -> list[int]:
    messages, text = line.get("messages"), line.get("text")
    if messages is None:
        if not isinstance(text, str):
            raise MistralcError(
                f"The fields are {', '.join(line) or 'none at all'}; expected `text`, a "
                "string, or `messages`, a list. Rename the field that holds the text."
            )
        check_text(text, "The text")
        return tokenizer.encode(text) if text else []
    good = isinstance(messages, list) and messages
    if not good or not all(isinstance(message, dict) for message in messages):
        raise MistralcError(
            f"`messages` is {json.dumps(messages)[:40]}; expected a non-empty list of objects with "
            "`role` and `content`. Correct the line."
        )
    for content in (message.get("content") for message in messages):
        if isinstance(content, str):
            check_text(content, "A message")
    return tokenizer.encode_chat(messages, add_generation_prompt=False)


def _array(ids: Sequence[int]) -> Ids:
    return np.asarray(ids, np.int64)
