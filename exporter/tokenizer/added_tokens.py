"""Merge the tokens that a checkpoint's files add to its vocabulary. Knows no vocabulary's format.

Fine-tunes add tokens in `tokenizer.json`, in `added_tokens_decoder` of `tokenizer_config.json`, in
`added_tokens.json`, or only by name (`eos_token`, `additional_special_tokens`). transformers merges
these in the order that `declared_tokens` follows (`PreTrainedTokenizerBase._from_pretrained` and
`TokenizersBackend.__init__`). Unlike transformers, a token of `added_tokens.json` is kept if the
decoder forgets it, and an id that a file states is kept if ids before it are unused.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import tokenizers

from exporter.tokenizer.bpe import AddedToken
from exporter.tokenizer.text_files import TextFiles
from graphs.errors import MistralcError
from runtime.text.tokenizer import is_token_id

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MORE = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")


def text_of(token: Any) -> str | None:
    """The text of a token in a settings file: a string, or an object that contains it."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None


def named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return every token that settings name, such as `sep_token` or `image_token`, by name.

    A mapping in `extra_special_tokens` or `model_specific_special_tokens` names tokens too.
    """
    named = dict(settings)
    for more in (*_MORE, "model_specific_special_tokens"):
        if isinstance(settings.get(more), Mapping):
            named |= settings[more]
    texts = {name: text_of(token) for name, token in named.items() if name.endswith("_token")}
    return {name: text for name, text in texts.items() if text is not None}


def check_settings(files: TextFiles) -> None:
    """Raise MistralcError for the first setting about tokens that is of the wrong type."""
    settings = files.settings
    values = {name: settings[name] for name in NAMED if settings.get(name) is not None}
    for name, value in values.items():
        text = text_of(value)
        if text is None:
            raise _malformed_setting(files, name, value, "a token's text")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise MistralcError(
                f"The tokenizer {files.directory} has no token {text!r:.60}, which the setting "
                f"{name} names: it is half of a UTF-16 surrogate pair. Download the checkpoint's "
                "settings again."
            )
    if not isinstance(settings.get("add_bos_token"), bool | None):
        value = settings["add_bos_token"]
        raise _malformed_setting(files, "add_bos_token", value, "true or false")


def declared_tokens(
    files: TextFiles, vocabulary: Mapping[str, int], added: Iterable[AddedToken]
) -> tuple[AddedToken, ...]:
    """Return all added tokens, by id. `added` are those of the vocabulary's own file.

    Raises MistralcError if the files give one token two ids, or two tokens one id.
    """
    tokens = {token.content: token for token in added}
    for token in (*_decoder(files), *_legacy(files, tokens.keys())):
        listed = tokens.get(token.content)
        known = vocabulary.get(token.content) if listed is None else listed.id
        if known is not None and known != token.id:
            raise MistralcError(
                f"The files in {files.directory} give the token {token.content!r:.60} two ids, "
                f"{known} and {token.id}; expected one. Download all tokenizer files from the same "
                "source."
            )
        tokens[token.content] = token
    free = max([*vocabulary.values(), *(token.id for token in tokens.values()), -1]) + 1
    for token in _named(files):
        if token.content in tokens:
            continue
        i = vocabulary.get(token.content, free)
        free += i == free
        tokens[token.content] = replace(token, id=i)
    _check_ids(files, vocabulary, tokens.values())
    return tuple(sorted(tokens.values(), key=lambda token: token.id))


def with_tokens(document: Mapping[str, Any], tokens: tuple[AddedToken, ...]) -> dict[str, Any]:
    """Return the document with these added tokens, at exactly their ids.

    `tokenizers` numbers added tokens itself, after the vocabulary, in their order. If that gives
    another id than the files, the token becomes a part of the vocabulary, which has ids of its own.
    """
    result = {**document, "added_tokens": [token.entry() for token in tokens]}
    vocabulary = document["model"]["vocab"]
    new = sorted(t.id for t in tokens if t.content not in vocabulary)
    if new != list(range(len(vocabulary), len(vocabulary) + len(new))):
        whole = {**vocabulary, **{token.content: token.id for token in tokens}}
        result["model"] = {**document["model"], "vocab": whole}
    return result


def require_ids(backend: tokenizers.Tokenizer, tokens: Iterable[AddedToken], where: str) -> None:
    """Raise MistralcError unless the tokenizer has every token at its id."""
    for token in tokens:
        found = backend.token_to_id(token.content)
        if found != token.id:
            raise MistralcError(
                f"The tokenizer of {where} would read the token {token.content!r:.60} as id "
                f"{found}; expected {token.id}, which its files state. Save the tokenizer again "
                "with transformers: `AutoTokenizer.from_pretrained(OLD).save_pretrained(NEW)`."
            )


def read_entries(entries: Any) -> tuple[AddedToken, ...]:
    """Read `added_tokens` of a document. Raises KeyError or TypeError if it is damaged."""
    return tuple(
        AddedToken(id=entry["id"], content=entry["content"], **_flags(entry)) for entry in entries
    )


def _decoder(files: TextFiles) -> Iterator[AddedToken]:
    """The tokens of `added_tokens_decoder`, whose flags override those of the vocabulary's file."""
    decoder = files.settings.get("added_tokens_decoder", {})
    if not isinstance(decoder, Mapping):
        raise _malformed(files, "added_tokens_decoder", decoder)
    named = {text_of(files.settings.get(name)) for name in NAMED}
    for key, entry in sorted(decoder.items(), key=lambda item: _number(files, item[0])):
        content = text_of(entry)
        if content is None or not isinstance(entry, Mapping):
            raise _malformed(files, "added_tokens_decoder", {key: entry})
        flags = _flags(entry)
        flags["special"] = bool(flags.get("special")) or content in named
        yield AddedToken(id=_number(files, key), content=content, **flags)


def _legacy(files: TextFiles, known: Collection[str]) -> Iterator[AddedToken]:
    """The tokens of `added_tokens.json`: special if a setting names them, text otherwise.

    What the vocabulary's own file or the decoder says about a token of the same text comes first.
    """
    special = {text_of(value) for value in _named_values(files)}
    decoder = files.settings.get("added_tokens_decoder", {})
    listed = {*known, *(text_of(entry) for entry in decoder.values())}
    for content, i in files.added_tokens.items():
        if not is_token_id(i):
            raise _malformed(files, "added_tokens.json", {content: i})
        if content not in listed:
            yield AddedToken(id=i, content=content, special=content in special)


def _named(files: TextFiles) -> Iterator[AddedToken]:
    """The tokens that settings name; their ids are not known yet (-1)."""
    for value in _named_values(files):
        content = text_of(value)
        if content:
            flags = _flags(value) if isinstance(value, Mapping) else {}
            yield AddedToken(id=-1, content=content, **{**flags, "special": True})


def _named_values(files: TextFiles) -> Iterator[Any]:
    settings = files.settings
    yield from (settings[name] for name in NAMED if settings.get(name) is not None)
    for name in _MORE:
        more = settings.get(name)
        if isinstance(more, Mapping):
            yield from more.values()
        elif isinstance(more, list):
            yield from more


def _flags(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: bool(entry[name]) for name in _FLAGS if entry.get(name) is not None}


def _number(files: TextFiles, key: Any) -> int:
    try:
        return int(key)
    except (TypeError, ValueError) as error:
        raise _malformed(files, "added_tokens_decoder", {key: "…"}) from error


def _malformed_setting(files: TextFiles, name: str, value: object, expected: str) -> MistralcError:
    return MistralcError(
        f"The setting {name} of the tokenizer {files.directory} is {value!r:.60}; expected "
        f"{expected}. Correct the checkpoint's settings, or download the file again."
    )


def _malformed(files: TextFiles, name: str, value: object) -> MistralcError:
    return MistralcError(
        f"`{name}` in {files.directory} holds {json.dumps(value, default=str)!s:.80}; expected "
        "token ids with the text of each token. Download the tokenizer files again."
    )


def _check_ids(
    files: TextFiles, vocabulary: Mapping[str, int], tokens: Iterable[AddedToken]
) -> None:
    """Raise MistralcError if two tokens have one id."""
    texts = {i: text for text, i in vocabulary.items()}
    for token in tokens:
        other = texts.setdefault(token.id, token.content)
        if other != token.content:
            raise MistralcError(
                f"The files in {files.directory} give the id {token.id} to two tokens, "
                f"{other!r:.60} and {token.content!r:.60}; expected one. Download all tokenizer "
                "files from the same source."
            )
