"""Read all text files of a checkpoint's directory into one value. Interprets none of them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.fields import read_json
from graphs.errors import MistralcError

_MODEL_FILE = re.compile(r".*\.model(?:\.(v\d+)(?:m\d+)?)?")
_JSON = {
    "config": "config.json",
    "generation": "generation_config.json",
    "tokenizer_config": "tokenizer_config.json",
    "special_tokens": "special_tokens_map.json",
    "added_tokens": "added_tokens.json",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFiles:
    """What the files beside the weights say about text. A file that is missing is empty here.

    `vocabularies` are the files that hold one, the one to build from first: Mistral's `tekken.json`
    is not among them if there is a `tokenizer.json`, and stands in `tekken`.
    """

    directory: Path
    vocabularies: tuple[Path, ...]
    tekken: Path | None
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    tokenizer_config: Mapping[str, Any]
    special_tokens: Mapping[str, Any]
    added_tokens: Mapping[str, Any]
    chat_template: str | None
    tool_chat_template: str | None = None

    @property
    def settings(self) -> Mapping[str, Any]:
        """`tokenizer_config.json`, and what only `special_tokens_map.json` says.

        As in transformers: where both name a token, the map counts, unless the configuration lists
        the added tokens itself, as all files written since 2023 do.
        """
        own = {name: value for name, value in self.tokenizer_config.items() if value is not None}
        if "added_tokens_decoder" in own:
            return {**self.special_tokens, **own}
        return {**own, **self.special_tokens}

    @property
    def tokenizer_class(self) -> str | None:
        """The tokenizer class that the checkpoint names, without `Fast`; None if it names none."""
        named = self.settings.get("tokenizer_class") or self.config.get("tokenizer_class")
        return named.removesuffix("Fast") if isinstance(named, str) else None

    @property
    def model_type(self) -> str | None:
        """The name that transformers gives the model's family."""
        found = self.config.get("model_type")
        return found if isinstance(found, str) else None


def read_text_files(directory: Path, base: Path | None = None) -> TextFiles:
    """Read a directory. Raises MistralcError if it has no vocabulary, or a file is damaged.

    `base` is the directory of the base model, if this one is an adapter's: `config.json` and
    `generation_config.json` are read there where the adapter has none.
    """
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    vocabularies = [directory / name for name in _vocabularies(names)]
    if not vocabularies:
        raise MistralcError(
            f"{directory} has no tokenizer; expected tokenizer.json or vocab.json with merges.txt "
            "(Hugging Face), tekken.json or tokenizer.model (Mistral). Download the file from the "
            "source of the weights."
        )
    tekkens = [directory / name for name in names if is_tekken(name)]
    contents: dict[str, Mapping[str, Any]] = {
        field: read_json(directory / name).values if name in names else {}
        for field, name in _JSON.items()
    }
    if base is not None and base.is_dir():
        for field in ("config", "generation"):
            if not contents[field] and (base / _JSON[field]).is_file():
                contents[field] = read_json(base / _JSON[field]).values
    templates = _templates(directory, names, contents["tokenizer_config"])
    return TextFiles(
        directory=directory,
        vocabularies=tuple(vocabularies),
        tekken=tekkens[0] if tekkens else None,
        config=contents["config"],
        generation=contents["generation"],
        tokenizer_config=contents["tokenizer_config"],
        special_tokens=contents["special_tokens"],
        added_tokens=contents["added_tokens"],
        chat_template=templates.get("default"),
        tool_chat_template=templates.get("tool_use"),
    )


def has_vocabulary(directory: Path) -> bool:
    """Whether a directory has a file with a vocabulary."""
    return bool(_vocabularies(sorted(path.name for path in directory.iterdir())))


def is_tekken(name: str) -> bool:
    """Whether a file of this name holds Mistral's tekken vocabulary."""
    return name.startswith("tekken") and name.endswith(".json")


def is_sentencepiece(name: str) -> bool:
    """Whether a file of this name holds a SentencePiece model."""
    return _MODEL_FILE.fullmatch(name) is not None


def version_in(name: str) -> str | None:
    """Return Mistral's tokenizer version in a file's name: `v3` of `tokenizer.model.v3`."""
    match = _MODEL_FILE.fullmatch(name)
    return match[1] if match else None


def _vocabularies(names: list[str]) -> list[str]:
    """Hugging Face's file first, then Mistral's own, the newest first."""
    tekkens = [name for name in names if is_tekken(name)]
    models = [name for name in names if is_sentencepiece(name)]
    models.sort(key=lambda name: int((version_in(name) or "v0")[1:]), reverse=True)
    pairs = ["vocab.json"] if {"vocab.json", "merges.txt"} <= set(names) else []
    return [*(["tokenizer.json"] if "tokenizer.json" in names else []), *tekkens, *models, *pairs]


def _templates(directory: Path, names: list[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The chat templates by name: of files of their own if there are any, else of the settings.

    The one named `default` is for every chat; the one named `tool_use` is for chats with tools.
    """
    files = {"default": directory / "chat_template.jinja"} if "chat_template.jinja" in names else {}
    more = sorted((directory / "additional_chat_templates").glob("*.jinja"))
    files |= {path.stem: path for path in more}
    if files:
        return {name: _read_template(path) for name, path in files.items()}
    template = settings.get("chat_template")
    if template is None and "chat_template.json" in names:
        template = read_json(directory / "chat_template.json").values.get("chat_template")
    if isinstance(template, dict):  # several named templates, as older files have them
        return template
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict)]
        return {str(entry.get("name")): entry.get("template") for entry in entries}
    return {"default": template}


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MistralcError(
            f"The chat template {path} cannot be read ({error}); expected text in UTF-8. "
            "Download the file again."
        ) from error
