"""One vocabulary file as a `tokenizers` document, with the settings that the file itself holds."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporter.checkpoint.gguf_file import read_gguf
from exporter.tokenizer import gguf, sentencepiece, tekken
from exporter.tokenizer.chat_formats import CHAT_TEMPLATES
from exporter.tokenizer.text_files import is_sentencepiece, is_tekken, version_in
from graphs.errors import MistralcError


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A tokenizer and the settings for its use; None means not given.

    `notes` are sentences for the user: where the bundle differs from what a file says.
    """

    tokenizer_json: str
    version: str | None = None
    bos: int | str | None = None  # an id, or the token's text
    eos: int | str | None = None
    unk_token: str | None = None
    pad_token: str | None = None
    named_tokens: Mapping[str, str] = field(default_factory=dict)  # others, as templates name them
    add_bos: bool | None = None
    bos_token: str | None = None  # in templates, if that is another than the one in front of text
    chat_template: str | None = None
    tool_chat_template: str | None = None  # for chats with tools, if that is another
    stop_ids: tuple[int, ...] = ()
    generation: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_source(path: Path) -> Source:
    """Read one vocabulary file. Raises MistralcError if it is damaged or of an unknown kind."""
    try:
        if path.suffix == ".gguf" or _begins_with(path, b"GGUF"):
            return from_gguf(path)
        if is_tekken(path.name):
            return from_tekken(path)
        if path.suffix == ".json":
            return Source(tokenizer_json=path.read_bytes().decode())
        if is_sentencepiece(path.name):
            return from_sentencepiece(path, sentencepiece.read_model(path))
    except (OSError, UnicodeDecodeError) as error:
        raise MistralcError(
            f"The tokenizer {path} cannot be read ({error}). Download the file again."
        ) from error
    raise MistralcError(
        f"{path} does not have the name of a tokenizer file; expected tokenizer.json, tekken.json, "
        "tokenizer.model or a .gguf file."
    )


def from_sentencepiece(path: Path, vocabulary: sentencepiece.Vocabulary) -> Source:
    """Convert a SentencePiece model that was read from `path`."""
    version = version_in(path.name) or vocabulary.version()
    return Source(
        tokenizer_json=to_json(sentencepiece.to_document(vocabulary)),
        version=version,
        bos=vocabulary.bos_id if vocabulary.bos_id >= 0 else None,
        eos=vocabulary.eos_id if vocabulary.eos_id >= 0 else None,
        unk_token="<unk>",  # noqa: S106  (a token of text)
        add_bos=vocabulary.bos_id >= 0,
        chat_template=CHAT_TEMPLATES.get(version),
    )


def from_tekken(path: Path) -> Source:
    """Convert a tekken file."""
    content = tekken.read_tekken(path)
    return Source(
        tokenizer_json=to_json(tekken.to_document(content)),
        version=f"{content.version}-tekken",
        bos="<s>",
        eos="</s>",
        unk_token="<unk>",  # noqa: S106  (a token of text)
        pad_token="<pad>",  # noqa: S106  (a token of text)
        add_bos=True,
        chat_template=CHAT_TEMPLATES.get(content.version),
    )


def from_gguf(path: Path) -> Source:
    """Convert the vocabulary in a GGUF file's metadata."""
    metadata = read_gguf(path).metadata
    found = gguf.convert(
        {
            k.removeprefix("tokenizer."): v
            for k, v in metadata.items()
            if k.startswith("tokenizer.")
        },
        str(metadata.get("general.name", "")),
        path,
    )
    return Source(
        tokenizer_json=to_json(found.document),
        version=found.version,
        bos=found.bos,
        eos=found.eos,
        add_bos=found.add_bos,
        chat_template=found.chat_template,
        tool_chat_template=metadata.get("tokenizer.chat_template.tool_use"),
        stop_ids=found.stop_ids,
        notes=found.notes,
    )


def to_json(document: Mapping[str, Any]) -> str:
    """Write a document as compactly as JSON allows."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


def _begins_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic
