"""Convert a checkpoint's tokenizer to the three files of a bundle. Knows nothing about weights.

Hugging Face's `tokenizer.json` is copied byte for byte if the files beside it add nothing.
Mistral's own files and the vocabulary of a GGUF file are converted to one with the same ids, so a
production host needs only the `tokenizers` package.
"""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from exporter.tokenizer.added_tokens import read_entries
from exporter.tokenizer.directory import read_directory
from exporter.tokenizer.generation import read_generation
from exporter.tokenizer.source import Source, read_source, to_json
from exporter.tokenizer.text_files import read_text_files
from graphs.errors import MistralcError
from runtime.text.tokenizer import Tokenizer, is_token_id, parse_tokenizer

# Tokens that end a turn in chat formats, for checkpoints that name only the end of a document.
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
# Marks of turns. `<think>` and `<tool_call>` are not among them: they belong to the answer's text.
_MARK = re.compile(r"<\|[^|]+\|>|<(start|end)_of_turn>|\[/?(INST|SYSTEM_PROMPT)\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFiles:
    """`tokenizer.json` as text; `tokenizer_config.json` and `generation_config.json` as data.

    `notes` are sentences for the user: where the bundle differs from what a file says.
    """

    tokenizer_json: str
    tokenizer_config: dict[str, Any]
    generation_config: dict[str, Any]
    notes: tuple[str, ...] = ()

    def open(self) -> Tokenizer:
        """Open the tokenizer as a bundle with these files does. Raises MistralcError."""
        backend = parse_tokenizer(self.tokenizer_json, "tokenizer.json")
        return Tokenizer(backend, self.tokenizer_config, self.generation_config)

    def largest_id(self) -> tuple[int, str]:
        """The largest token id, and that token's text."""
        vocabulary = parse_tokenizer(self.tokenizer_json, "tokenizer.json").get_vocab()
        return max((i, text) for text, i in vocabulary.items())


def read_tokenizer(source: Path, base: Path | None = None) -> TokenizerFiles:
    """Read the tokenizer of a checkpoint: a directory, or a GGUF file. Raises MistralcError.

    If `source` is the directory of an adapter, `base` is the checkpoint that it is merged into.
    """
    if source.is_file():
        return convert_file(source)
    files = read_text_files(source, base)
    return _files(read_directory(files), files.vocabularies[0])


def convert_file(path: Path) -> TokenizerFiles:
    """Convert one tokenizer file, without settings from other files."""
    return _files(read_source(path), path)


def require_rows(files: TokenizerFiles, rows: int) -> tuple[str, ...]:
    """Compare the vocabulary with the `rows` of the embedding; returns notes for the user.

    Rows that no token has are usual: the embedding is padded. Raises MistralcError if a token has
    no row.
    """
    largest, text = files.largest_id()
    if largest >= rows:
        raise MistralcError(
            f"The tokenizer's token {text!r:.60} has the id {largest}, and the embedding has "
            f"{rows:,} rows; expected a row for every token. Use the tokenizer that was published "
            "with these weights, or take the tokens that were added without training out of its "
            "files."
        )
    for token in files.generation_config.get("suppress_tokens", ()):
        if token >= rows:
            raise MistralcError(
                f"generation_config.json forbids the token {token}, and the embedding has "
                f"{rows:,} rows; expected ids below that in `suppress_tokens` and `bad_words_ids`. "
                "Correct the file, or download it again."
            )
    unused = rows - 1 - largest
    if not unused:
        return ()
    return (f"the embedding has {unused:,} more rows than there are tokens (padding)",)


def _files(source: Source, path: Path) -> TokenizerFiles:
    """Make the three files, and check them by opening them as the runtime does."""
    _check_types(source, path)
    text = _with_control_tokens(source)
    backend = parse_tokenizer(text, str(path))
    bos, eos = (_look_up(backend, token, path) for token in (source.bos, source.eos))
    add_bos = source.add_bos
    if add_bos is None:
        add_bos = bos is not None and backend.encode("a").ids[:1] == [bos[0]]
    template = source.chat_template
    turn_ends = (token for token in _END_OF_TURN if token in (template or ""))
    ends = [backend.token_to_id(token) for token in turn_ends]
    stop_ids = {*source.stop_ids, *([] if eos is None else [eos[0]])}
    stop_ids |= {token for token in ends if token is not None}
    tokenizer_config = {
        **source.named_tokens,
        "tokenizer_version": source.version,
        "bos_token": source.bos_token or (bos and bos[1]),
        "bos_token_id": bos and bos[0],
        "eos_token": eos and eos[1],
        "eos_token_id": eos and eos[0],
        "unk_token": source.unk_token,
        "pad_token": source.pad_token,
        "add_bos_token": add_bos,
        "chat_template": template,
        **({"tool_chat_template": tools} if (tools := source.tool_chat_template) else {}),
    }
    where = str(path.parent / "generation_config.json")
    carried, notes = read_generation(source.generation, where)
    generation_config = {"eos_token_id": sorted(stop_ids), **carried}
    opened = Tokenizer(backend, tokenizer_config, generation_config)
    if template is not None:
        opened.compile_templates()  # an error here is better than one on the production host
    return TokenizerFiles(
        tokenizer_json=text,
        tokenizer_config=tokenizer_config,
        generation_config=generation_config,
        notes=(*source.notes, *notes),
    )


def _with_control_tokens(source: Source) -> str:
    """Return the document with the marks of turns that the chat template writes as control tokens.

    Fine-tunes often add `<|im_start|>` as text. It is a control token all the same: a template must
    always write one token, and a user's message must never contain it.
    """
    templates = f"{source.chat_template or ''}\0{source.tool_chat_template or ''}"
    try:
        document = json.loads(source.tokenizer_json)
        tokens = read_entries(document["added_tokens"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return source.tokenizer_json  # opening it reports what is wrong
    written = {
        token.id
        for token in tokens
        if not token.special and _MARK.fullmatch(token.content) and token.content in templates
    }
    if not written:
        return source.tokenizer_json
    for entry in document["added_tokens"]:
        if entry["id"] in written:
            entry |= {"special": True, "normalized": False}
    return to_json(document)


_TYPES: Mapping[str, tuple[type, ...]] = {
    "version": (str,), "bos": (int, str), "eos": (int, str), "unk_token": (str,),
    "pad_token": (str,), "add_bos": (bool,), "chat_template": (str,),
    "tool_chat_template": (str,),
}  # fmt: skip


def _check_types(source: Source, path: Path) -> None:
    """Raise MistralcError for the first setting of a wrong type."""
    given = {name: getattr(source, name) for name in _TYPES}
    wrong = [name for name, v in given.items() if v is not None and type(v) not in _TYPES[name]]
    for name in (*wrong, *([] if all(map(is_token_id, source.stop_ids)) else ["stop_ids"])):
        expected = " or ".join(kind.__name__ for kind in _TYPES.get(name, (int,)))
        raise MistralcError(
            f"The setting {name} of the tokenizer {path} is {getattr(source, name)!r:.60}; "
            f"expected {expected}. Correct the checkpoint's settings, or download the file again."
        )


def _look_up(
    backend: tokenizers.Tokenizer, token: int | str | None, path: Path
) -> tuple[int, str] | None:
    """Return id and text of a token that is given as one of the two."""
    if token is None:
        return None
    i: int | None = None
    text: str | None = None
    if isinstance(token, str):
        text = token
        with suppress(UnicodeEncodeError):  # an unpaired surrogate, which is never a token
            i = backend.token_to_id(token)
    elif is_token_id(token):
        i, text = token, backend.id_to_token(token)
    if i is None or text is None:
        raise MistralcError(
            f"The tokenizer {path} has no token {token!r:.60}, which the checkpoint's settings "
            "name as BOS or EOS. Download tokenizer and settings from the same source."
        )
    return i, text
