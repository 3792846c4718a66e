"""Convert GGUF's tokenizer metadata to a `tokenizers` document. Reads no file."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from exporter.tokenizer import sentencepiece
from exporter.tokenizer.bpe import AddedToken, document
from exporter.tokenizer.sentencepiece import Piece, PieceType, Vocabulary
from graphs.errors import MistralcError

Metadata = Mapping[str, Any]  # by key, without the prefix `tokenizer.`

# By llama.cpp's name: how a pre-tokenizer splits text before byte-pair merging.
_PRE_TOKENIZERS: Mapping[str, tuple[dict[str, Any], ...]] = {
    "smollm": (
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ),
}


def to_document(metadata: Metadata, path: Path) -> dict[str, Any]:
    """Return the `tokenizers` document of a vocabulary of kind `llama` or `gpt2`."""
    kinds: dict[str, Callable[[Metadata, Path], dict[str, Any]]] = {
        "gpt2": _from_gpt2,
        "llama": _from_llama,
    }
    kind = metadata.get("ggml.model")
    if not isinstance(kind, str) or kind not in kinds:
        raise MistralcError(
            f"The tokenizer of {path} is of the kind {kind!r:.40}; expected `llama` "
            "(SentencePiece) or `gpt2` (byte-pair). Export from the original checkpoint instead of "
            "the GGUF."
        )
    try:
        return kinds[kind](metadata, path)
    except (
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:
        # TypeError and AttributeError: values of the wrong type.
        raise MistralcError(
            f"The tokenizer metadata of {path} is incomplete or damaged "
            f"({type(error).__name__}: {error!s:.200}). Download the file again, or export from "
            "the original checkpoint."
        ) from error


def _from_llama(metadata: Metadata, path: Path) -> dict[str, Any]:
    if len(metadata.get("ggml.precompiled_charsmap", ())):
        raise MistralcError(
            f"The tokenizer of {path} replaces characters (`precompiled_charsmap`); expected one "
            "that leaves them unchanged. Export from the original checkpoint instead of the GGUF."
        )
    columns = ("ggml.tokens", "ggml.scores", "ggml.token_type")
    rows = zip(*(metadata[column] for column in columns), strict=True)
    return sentencepiece.to_document(
        Vocabulary(
            pieces=tuple(
                Piece(text=text, score=score, type=PieceType(kind)) for text, score, kind in rows
            ),
            bos_id=metadata["ggml.bos_token_id"],
            eos_id=metadata["ggml.eos_token_id"],
            add_dummy_prefix=metadata.get("ggml.add_space_prefix", True),
            remove_extra_whitespaces=metadata.get("ggml.remove_extra_whitespaces", False),
        )
    )


def _from_gpt2(metadata: Metadata, path: Path) -> dict[str, Any]:
    pre = metadata.get("ggml.pre")
    if not isinstance(pre, str) or pre not in _PRE_TOKENIZERS:
        known = ", ".join(f"`{name}`" for name in _PRE_TOKENIZERS)
        raise MistralcError(
            f"The byte-pair tokenizer of {path} splits text by the rules named {pre!r:.40}; "
            f"expected {known}. Export from the original checkpoint instead of the GGUF."
        )
    tokens, kinds = metadata["ggml.tokens"], metadata["ggml.token_type"]
    ids = {text: i for i, text in enumerate(tokens)}
    if len(ids) != len(tokens):
        raise ValueError(f"{len(tokens) - len(ids)} tokens occur twice")
    added = (PieceType.CONTROL, PieceType.USER_DEFINED)
    return document(
        vocabulary=ids,
        merges=(_pair(merge) for merge in metadata["ggml.merges"]),
        added=[
            AddedToken(id=i, content=text, special=kind == PieceType.CONTROL)
            for i, (text, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind in added
        ],
        pre_tokenizer={"type": "Sequence", "pretokenizers": list(_PRE_TOKENIZERS[pre])},
        decoder={
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
    )


def _pair(merge: str) -> tuple[str, str]:
    left, right = merge.split(" ")
    return left, right
