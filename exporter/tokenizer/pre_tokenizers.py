"""How llama.cpp splits text before byte-pair merging, by `tokenizer.ggml.pre`.

From the constructor of `llm_tokenizer_bpe` and `llama_vocab::impl::load` in llama.cpp's
`src/llama-vocab.cpp`. Its expressions, not the original model's: where the two differ, as in
letters beyond ASCII for `tekken`, a GGUF file is read as llama.cpp reads it. What its
expressions leave to `src/unicode.cpp` (the last of several spaces) is written out here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENGLISH = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_REST_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
_START = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
_DIGITS = r"\p{N}"
_PUNCTUATION = r"!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreTokenizer:
    """Expressions that are applied one after another, each within the pieces of the one before.

    `whole_words` takes a piece that is a token before merging anything (`ignore_merges`). `bos`
    says whether text begins with BOS if the file does not say.
    """

    splits: tuple[str, ...]
    whole_words: bool = False
    bos: bool = False

    def steps(self) -> list[dict[str, Any]]:
        """Return the steps of a `tokenizers` pre-tokenizer."""
        splits = [
            {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
            for split in self.splits
        ]
        byte_level = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        return [*splits, {"type": "ByteLevel", **byte_level}]


def _cl100k(digits: str) -> str:
    return rf"{_ENGLISH}|{_START}\p{{L}}+|{digits}{_REST}"


def _cased(end: str, digits: str) -> str:
    """Words are split between a lower-case and an upper-case ASCII letter."""
    return rf"{_START}{_UPPER}*{_LOWER}+{end}|{_START}{_UPPER}+{_LOWER}*{end}|{digits}{_REST_SLASH}"


_LLAMA3 = _cl100k(r"\p{N}{1,3}")
_SPLITS: Mapping[str, PreTokenizer] = {
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2": PreTokenizer(
        splits=(_LLAMA3,), whole_words=True, bos=True
    ),
    "dbrx smaug-bpe chatglm-bpe": PreTokenizer(splits=(_LLAMA3,)),
    "glm4": PreTokenizer(splits=(_LLAMA3,), whole_words=True),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2": PreTokenizer(
        splits=(_cl100k(_DIGITS),)
    ),
    "qwen35": PreTokenizer(
        splits=(
            rf"{_ENGLISH}|{_START}[\p{{L}}\p{{M}}]+|{_DIGITS}"
            rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
        )
    ),
    "tekken": PreTokenizer(splits=(_cased("", _DIGITS),), whole_words=True, bos=True),
    "gpt-4o llama4 kanana2": PreTokenizer(splits=(_cased(f"{_ENGLISH}?", r"\p{N}{1,3}"),)),
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": PreTokenizer(
        splits=(_DIGITS, _GPT2)
    ),
    "gpt-2 phi-2 mpt olmo jais trillion granite-docling gigachat a.x-4.0 mellum exaone4": (
        PreTokenizer(splits=(_GPT2,))
    ),
    "falcon": PreTokenizer(splits=(r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "deepseek-v3 hunyuan-dense joyai-llm": PreTokenizer(
        splits=(
            r"\p{N}{1,3}",
            "[一-龥\u3040-\u309f\u30a0-\u30ff]+",
            rf"[{_PUNCTUATION}][A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+|"
            rf" ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
        )
    ),
    "default": PreTokenizer(splits=(r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    name: found for names, found in _SPLITS.items() for name in names.split()
}
