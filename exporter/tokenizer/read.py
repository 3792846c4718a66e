"""Convert a checkpoint's tokenizer to the three files of a bundle. Knows nothing about weights.

Hugging Face's `tokenizer.json` is copied byte for byte. Mistral's own files and the vocabulary of a
GGUF file are converted to one with the same ids, so a production host needs only the `tokenizers`
package.
"""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exporter.checkpoint.gguf_file import read_gguf
from exporter.fields import LARGEST_NUMBER, read_json
from exporter.tokenizer import gguf, sentencepiece, tekken
from exporter.tokenizer.chat_formats import CHAT_TEMPLATES
from graphs.errors import MistralcError
from runtime.text.tokenizer import Tokenizer, is_token_id, parse_tokenizer

_MODEL_FILE = re.compile(r".*\.model(?:\.(v\d+)(?:m\d+)?)?")
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
             "max_new_tokens")  # fmt: skip
# Tokens that end a turn in chat formats, for checkpoints that name only the end of a document.
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFiles:
    """`tokenizer.json` as text; `tokenizer_config.json` and `generation_config.json` as data."""

    tokenizer_json: str
    tokenizer_config: dict[str, Any]
    generation_config: dict[str, Any]

    def open(self) -> Tokenizer:
        """Open the tokenizer as a bundle with these files does. Raises MistralcError."""
        backend = parse_tokenizer(self.tokenizer_json, "tokenizer.json")
        return Tokenizer(backend, self.tokenizer_config, self.generation_config)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """A tokenizer and the settings for its use; None means not given."""

    tokenizer_json: str
    version: str | None = None
    bos: int | str | None = None  # an id, or the token's text
    eos: int | str | None = None
    unk_token: str | None = None
    pad_token: str | None = None
    add_bos: bool | None = None
    chat_template: str | None = None
    stop_ids: tuple[int, ...] = ()
    sampling: Mapping[str, Any] | None = None


def read_tokenizer(source: Path) -> TokenizerFiles:
    """Read the tokenizer of a checkpoint: a directory, or a GGUF file. Raises MistralcError."""
    if source.is_file():
        return convert_file(source)
    path = _find(source)
    return _files(_with_settings(_convert(path), source), path)


def convert_file(path: Path) -> TokenizerFiles:
    """Convert one tokenizer file, without settings from other files."""
    return _files(_convert(path), path)


def _find(directory: Path) -> Path:
    """Find the tokenizer file of a directory: Hugging Face's first, then Mistral's newest."""
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    tekkens = [name for name in names if name.startswith("tekken") and name.endswith(".json")]
    models = [name for name in names if _MODEL_FILE.fullmatch(name)]
    models.sort(key=lambda name: int((_version_in(name) or "v0")[1:]), reverse=True)
    candidates = [*(["tokenizer.json"] if "tokenizer.json" in names else []), *tekkens, *models]
    if not candidates:
        raise MistralcError(
            f"{directory} has no tokenizer; expected tokenizer.json (Hugging Face), tekken.json or "
            "tokenizer.model (Mistral). Download the file from the source of the weights."
        )
    return directory / candidates[0]


def _convert(path: Path) -> _Source:
    try:
        if path.suffix == ".gguf" or _begins_with(path, b"GGUF"):
            return _from_gguf(path)
        if path.suffix == ".json" and "tekken" in path.name:
            return _from_tekken(path)
        if path.suffix == ".json":
            return _Source(tokenizer_json=path.read_bytes().decode())
        if _MODEL_FILE.fullmatch(path.name):
            return _from_sentencepiece(path)
    except (OSError, UnicodeDecodeError) as error:
        raise MistralcError(
            f"The tokenizer {path} cannot be read ({error}). Download the file again."
        ) from error
    raise MistralcError(
        f"{path} does not have the name of a tokenizer file; expected tokenizer.json, tekken.json, "
        "tokenizer.model or a .gguf file."
    )


def _from_sentencepiece(path: Path) -> _Source:
    vocabulary = sentencepiece.read_model(path)
    version = _version_in(path.name) or vocabulary.version()
    return _Source(
        tokenizer_json=_to_json(sentencepiece.to_document(vocabulary)),
        version=version,
        bos=vocabulary.bos_id if vocabulary.bos_id >= 0 else None,
        eos=vocabulary.eos_id if vocabulary.eos_id >= 0 else None,
        unk_token="<unk>",  # noqa: S106  (a token of text)
        add_bos=vocabulary.bos_id >= 0,
        chat_template=CHAT_TEMPLATES.get(version),
    )


def _from_tekken(path: Path) -> _Source:
    content = tekken.read_tekken(path)
    return _Source(
        tokenizer_json=_to_json(tekken.to_document(content)),
        version=f"{content.version}-tekken",
        bos="<s>",
        eos="</s>",
        unk_token="<unk>",  # noqa: S106  (a token of text)
        pad_token="<pad>",  # noqa: S106  (a token of text)
        add_bos=True,
        chat_template=CHAT_TEMPLATES.get(content.version),
    )


def _from_gguf(path: Path) -> _Source:
    metadata = {
        key.removeprefix("tokenizer."): value
        for key, value in read_gguf(path).metadata.items()
        if key.startswith("tokenizer.")
    }
    eot = metadata.get("ggml.eot_token_id")
    return _Source(
        tokenizer_json=_to_json(gguf.to_document(metadata, path)),
        version=metadata.get("ggml.pre"),
        bos=metadata.get("ggml.bos_token_id"),
        eos=metadata.get("ggml.eos_token_id"),
        # llama.cpp's default: a BOS for SentencePiece vocabularies, none for byte-pair ones.
        add_bos=metadata.get("ggml.add_bos_token", metadata.get("ggml.model") == "llama"),
        chat_template=metadata.get("chat_template"),
        stop_ids=() if eot is None else (eot,),
    )


def _with_settings(source: _Source, directory: Path) -> _Source:
    """Add the settings in the directory's Hugging Face files to `source`."""
    config, generation, names = (
        read_json(path).values if path.is_file() else {}
        for path in (
            directory / "config.json",
            directory / "generation_config.json",
            directory / "special_tokens_map.json",
        )
    )
    own = directory / "tokenizer_config.json"
    settings = {**names, **(read_json(own).values if own.is_file() else {})}
    bos = None if "bos_token" in settings else config.get("bos_token_id")
    return replace(
        source,
        bos=_first_given(_token_text(settings, "bos_token"), source.bos, bos),
        eos=_first_given(_token_text(settings, "eos_token"), source.eos),
        unk_token=_first_given(_token_text(settings, "unk_token"), source.unk_token),
        pad_token=_first_given(_token_text(settings, "pad_token"), source.pad_token),
        add_bos=_first_given(settings.get("add_bos_token"), source.add_bos),
        chat_template=_first_given(_template_in(directory, settings), source.chat_template),
        stop_ids=_stop_ids(
            _first_given(generation.get("eos_token_id"), config.get("eos_token_id")), directory
        ),
        sampling={
            key: generation[key]
            for key in _SAMPLING
            if isinstance(generation.get(key), int | float)
            and abs(generation[key]) < LARGEST_NUMBER  # and not NaN
        },
    )


def _first_given(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _stop_ids(eos: Any, directory: Path) -> tuple[int, ...]:
    """Read Hugging Face's `eos_token_id`: a number, a list of numbers, or nothing."""
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(map(is_token_id, ids)):
        raise MistralcError(
            f"The `eos_token_id` of {directory} is {eos!r:.60}; expected a token id or a list of "
            "them. Correct generation_config.json or config.json."
        )
    return tuple(ids)


def _template_in(directory: Path, settings: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise MistralcError(
                f"The chat template {path} cannot be read ({error}); expected text in UTF-8. "
                "Download the file again."
            ) from error
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = (entry for entry in template if isinstance(entry, dict))
        found = (entry.get("template") for entry in named if entry.get("name") == "default")
        return next(found, None)
    return template


def _files(source: _Source, path: Path) -> TokenizerFiles:
    """Make the three files, and check them by opening them as the runtime does."""
    _check_types(source, path)
    backend = parse_tokenizer(source.tokenizer_json, str(path))
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
        "tokenizer_version": source.version,
        "bos_token": bos and bos[1],
        "bos_token_id": bos and bos[0],
        "eos_token": eos and eos[1],
        "eos_token_id": eos and eos[0],
        "unk_token": source.unk_token,
        "pad_token": source.pad_token,
        "add_bos_token": add_bos,
        "chat_template": template,
    }
    generation_config = {"eos_token_id": sorted(stop_ids), **(source.sampling or {})}
    opened = Tokenizer(backend, tokenizer_config, generation_config)
    if template is not None:
        _ = opened.chat_template  # an error here is better than one on the production host
    return TokenizerFiles(
        tokenizer_json=source.tokenizer_json,
        tokenizer_config=tokenizer_config,
        generation_config=generation_config,
    )


_TYPES: Mapping[str, tuple[type, ...]] = {
    "version": (str,), "bos": (int, str), "eos": (int, str), "unk_token": (str,),
    "pad_token": (str,), "add_bos": (bool,), "chat_template": (str,),
}  # fmt: skip


def _check_types(source: _Source, path: Path) -> None:
    """Raise MistralcError for the first setting of a wrong type."""
    given = {name: getattr(source, name) for name in _TYPES}
    wrong = [name for name, v in given.items() if v is not None and type(v) not in _TYPES[name]]
    for name in (*wrong, *([] if all(map(is_token_id, source.stop_ids)) else ["stop_ids"])):
        expected = " or ".join(kind.__name__ for kind in _TYPES.get(name, (int,)))
        raise MistralcError(
            f"The setting {name} of the tokenizer {path} is {getattr(source, name)!r:.60}; "
            f"expected {expected}. Correct the checkpoint's settings, or download the file again."
        )


def _look_up(backend: Any, token: int | str | None, path: Path) -> tuple[int, str] | None:
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


def _token_text(settings: Mapping[str, Any], name: str) -> str | None:
    """Read a token in `tokenizer_config.json`: a string, or an object that contains it."""
    token = settings.get(name)
    return token.get("content") if isinstance(token, dict) else token


def _begins_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _version_in(name: str) -> str | None:
    match = _MODEL_FILE.fullmatch(name)
    return match[1] if match else None


def _to_json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))
