"""Does a bundle read text as the checkpoint's own tooling does? Knows nothing about weights.

300 strings and 30 chats are encoded by both. What they were compared with is recorded in the
manifest, also if that was nothing. Raises MistralcError for the first string or chat that differs.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.checkpoint.gguf_file import read_gguf
from exporter.checkpoint.locate import locate
from exporter.checks.text_references import Ids, Missing, Reference, references
from exporter.checks.text_samples import Chat, chats, strings
from exporter.tokenizer.read import TokenizerFiles, read_tokenizer, require_rows
from exporter.tokenizer.text_files import has_vocabulary
from graphs.errors import MistralcError, UsageError
from runtime.text.tokenizer import Tokenizer

_KEPT = 8  # results of comparisons in this process, as an export and its verification ask twice


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A string or chat of which the two programs give different ids; None: it was refused."""

    what: str
    expected: Ids
    got: Ids | None

    def __str__(self) -> str:
        if self.got is None:
            return f"{self.what} is refused here"
        at = next(
            (i for i, pair in enumerate(zip(self.got, self.expected, strict=False))
             if pair[0] != pair[1]), min(len(self.got), len(self.expected)),
        )  # fmt: skip
        begin = max(0, at - 2)
        return (
            f"of {self.what}, tokens {begin} to {begin + 6} are {self.got[begin : begin + 6]} here "
            f"and {self.expected[begin : begin + 6]} there"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What a comparison with one program found."""

    reference: Reference
    strings: int
    chats: int
    differences: tuple[Difference, ...]


def compare_text(source: Path, files: TokenizerFiles) -> dict[str, Any]:
    """Compare the tokenizer of a bundle with that of its checkpoint; returns the record of it.

    `source` is the checkpoint: a directory or a GGUF file. The record has `compared_with`, the
    numbers of `strings` and `chats`, and `overruled` if a program that may be overruled gave other
    ids. Raises MistralcError if the ids differ.
    """
    key = _key(source, files)
    if key not in _known:
        while len(_known) >= _KEPT:
            _known.pop(next(iter(_known)))
        _known[key] = _record(examine(source, files.open()))
    return dict(_known[key])


_known: dict[str, dict[str, Any]] = {}


def text_record(source: Path, files: TokenizerFiles, rows: int) -> dict[str, Any]:
    """Check the tokenizer of a bundle; returns the manifest's record of it.

    `rows` is the size of the embedding. Raises MistralcError if a token has no row, or if the
    checkpoint's own tooling gives other ids.
    """
    notes = (*files.notes, *require_rows(files, rows))
    record = compare_text(source, files)
    return record | ({"notes": list(notes)} if notes else {})


def verify_text(bundle: Path, checkpoint: str, lora: Sequence[str], rows: int) -> dict[str, Any]:
    """Compare the tokenizer in a finished bundle with that of its checkpoint; returns the record.

    Raises MistralcError as `text_record` does, or if the bundle's files are not those that an
    export of the checkpoint writes today.
    """
    place = locate(checkpoint, lora)
    files = read_tokenizer(place.text, place.path)
    if (bundle / "tokenizer.json").read_text(encoding="utf-8") != files.tokenizer_json:
        raise MistralcError(
            f"The tokenizer.json of {bundle} is not the one that {checkpoint} gives; expected the "
            "same. The checkpoint's tokenizer files were changed after the export, or another "
            "version of mistralc wrote the bundle: export again."
        )
    return text_record(place.text, files, rows)


def plan_notes(source: str, lora: Sequence[str], rows: int) -> tuple[str, ...]:
    """What an export of `source` would note about its text files; nothing if there are none.

    Raises MistralcError as an export would if they cannot be carried over.
    """
    place = locate(source, lora)
    path = place.text
    if path.is_file() and "tokenizer.ggml.model" not in read_gguf(path).metadata:
        return ()
    if path.is_dir() and not has_vocabulary(path):
        return ()
    files = read_tokenizer(path, place.path)
    return (*files.notes, *require_rows(files, rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """The programs that agree; those that were overruled; why others could not be asked."""

    agreed: tuple[Compared, ...]
    overruled: tuple[Compared, ...]
    missing: tuple[str, ...]


def examine(source: Path, ours: Tokenizer) -> Examined:
    """Ask the programs that read `source`, until one with the last word agrees.

    Raises MistralcError if one that cannot be overruled disagrees, or if all do.
    """
    agreed: list[Compared] = []
    overruled: list[Compared] = []
    missing: list[str] = []
    for reference in references(source, ours):
        if isinstance(reference, Missing):
            missing.append(reference.why)
            continue
        if agreed and not reference.additional:
            continue  # the first word was the last one
        found = compare_with(reference, ours)
        if not found.differences:
            agreed.append(found)
        elif reference.final:
            raise _differs(found)
        else:
            overruled.append(found)
    if overruled and not agreed:
        raise _differs(overruled[0])
    return Examined(agreed=tuple(agreed), overruled=tuple(overruled), missing=tuple(missing))


def compare_with(reference: Reference, ours: Tokenizer) -> Compared:
    """Encode all strings and chats with both; a chat that the other program refuses is left out."""
    texts = strings()
    differences = list(_string_differences(reference, ours, texts))
    compared = 0
    if reference.chat is not None and ours.has_chat_template:
        for i, chat in enumerate(chats()):
            try:
                expected = list(reference.chat(chat))
            except Exception:  # noqa: S112  (a template's refusal may be any exception)
                continue
            compared += 1
            got = _chat_ids(ours, chat)
            if got != expected:
                differences.append(Difference(what=f"chat {i}", expected=expected, got=got))
    return Compared(
        reference=reference, strings=len(texts), chats=compared, differences=tuple(differences)
    )


def _string_differences(
    reference: Reference, ours: Tokenizer, texts: tuple[str, ...]
) -> Iterator[Difference]:
    for text in texts:
        expected = list(reference.encode(text))
        got = ours.encode(text, add_bos=reference.with_bos)
        if got != expected:
            yield Difference(what=f"the text {text!r:.60}", expected=expected, got=got)


def _chat_ids(ours: Tokenizer, chat: Chat) -> Ids | None:
    prompt = chat[-1]["role"] != "assistant"
    try:
        return ours.encode_chat(chat, add_generation_prompt=prompt)
    except UsageError:
        return None


def _record(found: Examined) -> dict[str, Any]:
    if not found.agreed:
        why = "; ".join(dict.fromkeys(found.missing))
        return {"compared_with": f"nothing: {why}", "strings": 0, "chats": 0}
    record: dict[str, Any] = {
        "compared_with": ", ".join(one.reference.name for one in found.agreed),
        "strings": max(one.strings for one in found.agreed),
        "chats": max(one.chats for one in found.agreed),
    }
    if found.overruled:
        record["overruled"] = [
            f"{one.reference.name} gives other ids for {len(one.differences)} of "
            f"{one.strings + one.chats}: {one.differences[0]!s}"
            for one in found.overruled
        ]
    return record


def _differs(found: Compared) -> MistralcError:
    return MistralcError(
        f"The bundle would not read text as the checkpoint's own tooling: "
        f"{found.reference.name} gives other token ids for {len(found.differences)} of "
        f"{found.strings} strings and {found.chats} chats; expected the same for all. For example, "
        f"{found.differences[0]!s}. Save the tokenizer again with the program that made it; if "
        "that changes nothing, please report this with the tokenizer's files."
    )


def _key(source: Path, files: TokenizerFiles) -> str:
    """A digest of the files that a comparison depends on; of a GGUF file, of its state on disk."""
    digest = hashlib.sha256(repr((str(source), files)).encode())
    for path in [source] if source.is_file() else sorted(source.iterdir()):
        if path.suffix in (".json", ".jinja", ".txt") or ".model" in path.name:
            digest.update(path.name.encode() + path.read_bytes())
        elif source.is_file():
            state = path.stat()
            digest.update(repr((state.st_size, state.st_mtime_ns, state.st_ino)).encode())
    return digest.hexdigest()
