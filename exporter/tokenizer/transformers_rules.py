"""What transformers changes in a `tokenizer.json` when it opens one. Reads no file.

`AutoTokenizer` takes most files as they are. Only `LlamaTokenizer` does not: the space before the
first word follows `legacy` and `add_prefix_space` of `tokenizer_config.json` instead of the file
(transformers 5, `models/llama/tokenization_llama.py`).
"""

from collections.abc import Mapping
from typing import Any

from exporter.tokenizer.text_files import TextFiles, is_sentencepiece

SPACE = "\u2581"

# Families whose tokenizer transformers opens as it is in the file, although their configurations
# name LlamaTokenizer (`TOKENIZER_MAPPING_NAMES` in `models/auto/tokenization_auto.py`).
_AS_WRITTEN = frozenset({
    "granite", "ministral", "ministral3", "mistral", "mistral3", "mixtral", "phi3", "pixtral",
    "qwen2", "qwen3",
})  # fmt: skip
MISTRAL = frozenset({"ministral", "ministral3", "mistral", "mistral3", "mixtral"})
"""Families whose vocabularies have chat formats of Mistral's own."""

_PATCHED = frozenset({"ministral", "mistral", "mistral3", "pixtral", "voxtral"})

MISTRAL_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How tekken splits text. Many `tokenizer.json` of Mistral's models have another expression; what
transformers calls `fix_mistral_regex` puts this one in its place."""


def reads_as_llama(files: TextFiles, document: Mapping[str, Any]) -> bool:
    """Whether LlamaTokenizer's rule for the first space is to be applied to this vocabulary.

    A SentencePiece model without a tokenizer.json has that space before every text already, as
    `legacy: true` asks, and as Mistral's own chat formats need it.
    """
    if is_sentencepiece(files.vocabularies[0].name):
        plain = files.settings.get("legacy") or files.chat_template is None
        return files.tokenizer_class == "LlamaTokenizer" and not plain
    byte_level = any(
        step.get("type") == "ByteLevel"
        for part in ("pre_tokenizer", "decoder")
        for step in steps_of(document.get(part))
    )
    return (
        files.tokenizer_class == "LlamaTokenizer"
        and files.model_type not in _AS_WRITTEN
        and not byte_level
    )


def as_llama(document: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the document with LlamaTokenizer's model, normalizer, pre-tokenizer and decoder."""
    prefixed = settings.get("add_prefix_space")
    scheme = "never"
    if prefixed is None or prefixed:
        scheme = "always" if settings.get("legacy") else "first"
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if scheme != "never":
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    model = {
        **document["model"], "unk_token": None, "fuse_unk": True, "byte_fallback": True,
        "dropout": None, "ignore_merges": False,
    }  # fmt: skip
    pre_tokenizer = {
        "type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False,
    }  # fmt: skip
    return {
        **document, "model": model, "normalizer": None, "pre_tokenizer": pre_tokenizer,
        "decoder": {"type": "Sequence", "decoders": decoders},
    }  # fmt: skip


def splits_like_tekken(document: Mapping[str, Any]) -> bool:
    """Whether the first step of the pre-tokenizer splits text as tekken does."""
    first = next(iter(steps_of(document.get("pre_tokenizer"))), {})
    return bool(first.get("pattern") == {"Regex": MISTRAL_SPLIT})


def has_wrong_split(files: TextFiles, document: Mapping[str, Any]) -> bool:
    """Whether this is a Mistral tokenizer with an expression that splits other than tekken's.

    The conditions are those of transformers (`TokenizersBackend._patch_mistral_regex`).
    """
    version = str(files.config.get("transformers_version") or "0").split(".")[0]
    return (
        files.model_type in _PATCHED
        and (not version.isdigit() or int(version) < 5)
        and len(document["model"]["vocab"]) > 100_000
        and document.get("pre_tokenizer") is not None
        and not splits_like_tekken(document)
    )


def with_mistral_split(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the document with tekken's expression as the first step of its pre-tokenizer."""
    split = {
        "type": "Split", "pattern": {"Regex": MISTRAL_SPLIT}, "behavior": "Isolated",
        "invert": False,
    }  # fmt: skip
    present = document["pre_tokenizer"]
    rest = [present]
    if present["type"] == "Sequence":
        rest = present["pretokenizers"][1:]
    elif present["type"] == "Metaspace":
        byte_level = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        rest = [{"type": "ByteLevel", **byte_level}]
    return {**document, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, *rest]}}


def steps_of(part: Any) -> list[Mapping[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, those inside sequences included."""
    if not isinstance(part, Mapping):
        return []
    inner = [
        step
        for name in ("normalizers", "pretokenizers", "decoders")
        for each in part.get(name, ())
        for step in steps_of(each)
    ]
    return inner if part.get("type") == "Sequence" else [part]
