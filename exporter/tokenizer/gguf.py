"""Convert GGUF's tokenizer metadata to a `tokenizers` document, as llama.cpp reads it.

The rules are those of `llama_vocab::impl::load` and `tokenize` in its `src/llama-vocab.cpp`. Reads
no file.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.tokenizer import sentencepiece
from exporter.tokenizer.bpe import AddedToken, document
from exporter.tokenizer.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from exporter.tokenizer.sentencepiece import Piece, PieceType, Vocabulary
from graphs.errors import MistralcError

Metadata = Mapping[str, Any]  # by key, without the prefix `tokenizer.`

# What ends an answer, by its text: llama.cpp's `special_eog_ids`.
_ENDS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
    "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "[e~[",
    "<｜end▁of▁sentence｜>",
})  # fmt: skip
_MIDDLE_ENDS: Mapping[
    str, tuple[str, ...]
] = {  # of code around a gap; the first kind that is there
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
_RSTRIP_EXCEPT = frozenset({"<unk>", "<s>", "<|endoftext|>"})  # of Phi-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """The document, and what the metadata say about its use."""

    document: dict[str, Any]
    version: str | None
    bos: int | None
    eos: int | None
    add_bos: bool
    stop_ids: tuple[int, ...]
    chat_template: str | None
    notes: tuple[str, ...] = ()


def convert(metadata: Metadata, model_name: str, path: Path) -> Converted:
    """Convert a vocabulary of kind `llama` or `gpt2`; `model_name` is `general.name`.

    Raises MistralcError if the metadata are damaged, or llama.cpp's rules for them are not known.
    """
    kinds: dict[str, Callable[[Metadata, str, Path], Converted]] = {
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
        return kinds[kind](metadata, model_name.lower(), path)
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


def _from_llama(metadata: Metadata, model_name: str, path: Path) -> Converted:
    if len(metadata.get("ggml.precompiled_charsmap", ())):
        raise MistralcError(
            f"The tokenizer of {path} replaces characters (`precompiled_charsmap`); expected one "
            "that leaves them unchanged. Export from the original checkpoint instead of the GGUF."
        )
    columns = ("ggml.tokens", "ggml.scores", "ggml.token_type")
    rows = list(zip(*(metadata[column] for column in columns), strict=True))
    texts, kinds = [row[0] for row in rows], [PieceType(row[2]) for row in rows]
    ends = _ends(metadata, texts)
    vocabulary = Vocabulary(
        pieces=tuple(
            Piece(text=text, score=row[1], type=kind)
            for text, row, kind in zip(texts, rows, _kinds(texts, kinds, ends), strict=True)
        ),
        bos_id=metadata.get("ggml.bos_token_id", 1),
        eos_id=metadata.get("ggml.eos_token_id", 2),
        add_dummy_prefix=metadata.get("ggml.add_space_prefix", True),
    )
    return _converted(
        sentencepiece.to_document(
            vocabulary, prefix_everywhere=True, rstrip=_rstrip(model_name, vocabulary.pieces)
        ),
        metadata, ends, bos=vocabulary.bos_id, eos=vocabulary.eos_id, add_bos=True,
    )  # fmt: skip


def _from_gpt2(metadata: Metadata, model_name: str, path: Path) -> Converted:
    rules = _pre_tokenizer(metadata, path)
    texts = list(metadata["ggml.tokens"])
    ids = {text: i for i, text in enumerate(texts)}
    if len(ids) != len(texts):
        raise ValueError(f"{len(texts) - len(ids)} tokens occur twice")
    given = metadata.get("ggml.token_type") or [PieceType.NORMAL] * len(texts)
    if len(given) != len(texts):
        raise ValueError(f"{len(given)} token types for {len(texts)} tokens")
    ends = _ends(metadata, texts)
    kinds = _kinds(texts, [PieceType(kind) for kind in given], ends)
    pieces = [Piece(text=t, score=0.0, type=k) for t, k in zip(texts, kinds, strict=True)]
    rstrip = _rstrip(model_name, pieces)
    added = (PieceType.CONTROL, PieceType.USER_DEFINED, PieceType.UNKNOWN)
    made = document(
        vocabulary=ids,
        merges=(_pair(merge) for merge in metadata["ggml.merges"]),
        added=[
            AddedToken(
                id=i, content=piece.text, special=piece.type is not PieceType.USER_DEFINED,
                normalized=False, rstrip=piece.text in rstrip,
            )
            for i, piece in enumerate(pieces)
            if piece.type in added
        ],
        pre_tokenizer={"type": "Sequence", "pretokenizers": rules.steps()},
        decoder={
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        ignore_merges=rules.whole_words,
    )  # fmt: skip
    return _converted(
        made, metadata, ends, bos=metadata.get("ggml.bos_token_id"),
        eos=metadata.get("ggml.eos_token_id"), add_bos=rules.bos,
    )  # fmt: skip


def _pre_tokenizer(metadata: Metadata, path: Path) -> PreTokenizer:
    pre = metadata.get("ggml.pre") or "default"  # as llama.cpp, which warns
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        known = ", ".join(f"`{name}`" for name in PRE_TOKENIZERS)
        raise MistralcError(
            f"The byte-pair tokenizer of {path} splits text by the rules named {pre!r:.40}; "
            f"expected one of {known}. Export from the original checkpoint instead of the GGUF."
        )
    return PRE_TOKENIZERS[pre]


def _converted(
    made: dict[str, Any],
    metadata: Metadata,
    ends: set[int],
    *,
    bos: int | None,
    eos: int | None,
    add_bos: bool,
) -> Converted:
    added = metadata.get("ggml.add_bos_token", add_bos)
    notes = []
    if metadata.get("ggml.model") == "gpt2" and not metadata.get("ggml.pre"):
        notes.append(
            "the GGUF file does not say how to split text (`tokenizer.ggml.pre`), so llama.cpp's "
            "`default` is used; the model was probably trained with another rule"
        )
    return Converted(
        document=made,
        version=metadata.get("ggml.pre"),
        bos=bos,
        eos=eos,
        add_bos=added and bos is not None if isinstance(added, bool) else added,
        stop_ids=tuple(sorted(ends)),
        chat_template=metadata.get("chat_template"),
        notes=tuple(notes),
    )


def _ends(metadata: Metadata, texts: list[str]) -> set[int]:
    """The ids of the tokens that end an answer."""
    ids = {text: i for i, text in enumerate(texts)}
    found = {ids[text] for text in _ENDS & ids.keys()}
    for name in ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep"):
        given = metadata.get(f"ggml.{name}_token_id")
        if given is None:
            given = next((ids[text] for text in _MIDDLE_ENDS.get(name, ()) if text in ids), None)
        if isinstance(given, int) and 0 <= given < len(texts):  # -1: the file has none
            found.add(given)
    present = {texts[i] for i in found}
    calls = {"<|return|>", "<|call|>"} <= present or (
        "<|flush|>" in present and bool({"<|call|>", "<|calls|>"} & present)
    )
    return found - {ids.get("<|end|>", -1)} if calls else found


def _kinds(texts: list[str], kinds: list[PieceType], ends: set[int]) -> Iterator[PieceType]:
    """The type of each token; one that ends an answer is a control token whatever the file says."""
    for i, (text, kind) in enumerate(zip(texts, kinds, strict=True)):
        yield PieceType.CONTROL if i in ends and text in _OVERRIDDEN else kind


_OVERRIDDEN = _ENDS | {text for group in _MIDDLE_ENDS.values() for text in group}


def _rstrip(model_name: str, pieces: list[Piece] | tuple[Piece, ...]) -> frozenset[str]:
    """The tokens after which spaces are dropped: those of Phi-3, which llama.cpp tells by name."""
    if "phi-3" not in model_name and "phi3" not in model_name:
        return frozenset()
    kinds = (PieceType.CONTROL, PieceType.USER_DEFINED, PieceType.UNKNOWN)
    special = {piece.text for piece in pieces if piece.type in kinds} | {"</s>"}
    return frozenset(special - _RSTRIP_EXCEPT)


def _pair(merge: str) -> tuple[str, str]:
    left, right = merge.split(" ")
    return left, right
