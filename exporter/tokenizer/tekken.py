"""Convert Mistral's `tekken.json` to a `tokenizers` document. Knows no directories.

A tekken vocabulary is one of tiktoken: byte strings ranked by the order in which they were learned,
truncated to the model's size. The special tokens have the first ids.
"""

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.tokenizer.bpe import AddedToken, document, merges_from_ranks
from graphs.errors import MistralcError
from runtime.text.detokenizer import byte_characters

# The special tokens of older files, which do not list them; in order of their ids.
_FIRST_SPECIAL = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]",
    "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
)  # fmt: skip


_MAX_SPECIAL = 100_000  # ids; Mistral reserves 1,000, and a damaged number must not fill memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Tekken:
    """The contents of a file: `special[i]` has id i, `vocabulary[r]` id `len(special) + r`."""

    version: str
    pattern: str
    special: tuple[str, ...]
    vocabulary: tuple[bytes, ...]


def read_tekken(path: Path) -> Tekken:
    """Read a tekken file. Raises MistralcError if it is damaged or inconsistent."""
    try:
        content = json.loads(path.read_bytes())
        config, listed = content["config"], content["vocab"]
        num_special = int(config["default_num_special_tokens"])
        size = int(config["default_vocab_size"]) - num_special
        vocabulary = tuple(base64.b64decode(row["token_bytes"]) for row in listed[:size])
        named = content.get("special_tokens")
        names = [row["token_str"] for row in named] if named else list(_FIRST_SPECIAL)
        version, pattern = str(config["version"]), str(config["pattern"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise MistralcError(
            f"{path} cannot be read as a tekken tokenizer "
            f"({type(error).__name__}: {error!s:.200}); expected JSON with `config`, `vocab` and "
            "perhaps `special_tokens`. Download it again."
        ) from error
    if num_special > _MAX_SPECIAL or not all(isinstance(name, str) for name in names):
        raise MistralcError(
            f"The tekken tokenizer {path} reserves {num_special:,} special tokens, or one of them "
            f"is not a string; expected strings, at most {_MAX_SPECIAL:,}. Download it again."
        )
    special = tuple(names + [f"<SPECIAL_{i}>" for i in range(len(names), num_special)])
    single_bytes = tuple(bytes([byte]) for byte in range(256))
    wrong = {
        f"{len(vocabulary)} tokens where its configuration asks for {size}": (
            len(vocabulary) != size
        ),
        "a vocabulary that does not begin with the 256 bytes": vocabulary[:256] != single_bytes,
        "a token twice": len(set(vocabulary)) != len(vocabulary),
        f"{len(special)} special tokens where it reserves {num_special}, each once": (
            len(set(special)) != num_special
        ),
    }
    for what, found in wrong.items():
        if found:
            raise MistralcError(
                f"The tekken tokenizer {path} has {what}. The file is damaged: download it again."
            )
    return Tekken(version=version, pattern=pattern, special=special, vocabulary=vocabulary)


def to_document(tekken: Tekken) -> dict[str, Any]:
    """Return the `tokenizers` document with the same ids."""
    ranks = {token: rank for rank, token in enumerate(tekken.vocabulary)}
    letters = {token: _letters(token) for token in ranks}
    ids = {text: i for i, text in enumerate(tekken.special)}
    ids |= {letters[token]: len(tekken.special) + rank for token, rank in ranks.items()}
    if len(ids) != len(tekken.special) + len(ranks):
        clash = sorted(set(tekken.special) & set(letters.values()))
        raise MistralcError(
            f"The tekken tokenizer has {clash} both as special tokens and as text; expected each "
            "string once. Use a checkpoint with a tokenizer.json."
        )
    split = {"type": "Split", "pattern": {"Regex": tekken.pattern}, "behavior": "Isolated"}
    byte_level = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    steps = [{**split, "invert": False}, {"type": "ByteLevel", **byte_level}]
    return document(
        vocabulary=ids,
        merges=((letters[a], letters[b]) for a, b in merges_from_ranks(ranks)),
        added=[AddedToken(id=i, content=text) for i, text in enumerate(tekken.special)],
        pre_tokenizer={"type": "Sequence", "pretokenizers": steps},
        decoder={"type": "ByteLevel", **byte_level},
        ignore_merges=True,  # tiktoken takes a word that is a token before it merges anything
    )


def _letters(token: bytes) -> str:
    alphabet = byte_characters()
    return "".join(alphabet[byte] for byte in token)
