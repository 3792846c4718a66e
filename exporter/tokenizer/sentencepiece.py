"""Convert a SentencePiece BPE vocabulary to a `tokenizers` document. Knows no directories.

The pieces come from a model file (Mistral's `tokenizer.model*`) or from a GGUF file, which has the
same table. A piece's score is minus its position in the order in which the pieces were learned.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from exporter.tokenizer.bpe import AddedToken, document, merges_from_ranks
from graphs.errors import MistralcError

SPACE = "\u2581"
_BPE = 2  # TrainerSpec.ModelType


class PieceType(IntEnum):
    """`ModelProto.SentencePiece.Type`; a GGUF's `token_type` has the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One row of the vocabulary; its id is its index."""

    text: str
    score: float
    type: PieceType


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The part of a SentencePiece model that tokenization depends on."""

    pieces: tuple[Piece, ...]
    bos_id: int
    eos_id: int
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = False

    def version(self) -> str:
        """Tell Mistral's tokenizer version by the control tokens that each version added."""
        control = {piece.text for piece in self.pieces if piece.type is PieceType.CONTROL}
        marks = {"v7": "[SYSTEM_PROMPT]", "v3": "[PREFIX]", "v2": "[INST]"}
        return next((version for version, mark in marks.items() if mark in control), "v1")


def read_model(path: Path) -> Vocabulary:
    """Read a SentencePiece model file. Raises MistralcError if it is damaged or not supported."""
    proto = ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise MistralcError(
            f"{path} cannot be read as a SentencePiece model ({error}). The file is truncated, or "
            "something else, such as a Git LFS pointer: download it again."
        ) from error
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    refused = {
        "no pieces": not proto.pieces,
        "pieces that are not UTF-8": any(not isinstance(p.piece, str) for p in proto.pieces),
        "a model type other than BPE": trainer.model_type != _BPE,
        "whitespace as suffix": trainer.treat_whitespace_as_suffix,
        "unescaped whitespace": not normalizer.escape_whitespaces,
        "unused pieces": any(piece.type == PieceType.UNUSED for piece in proto.pieces),
        "a denormalizer": bool(proto.denormalizer_spec.precompiled_charsmap),
        # `tokenizers` replaces graphemes, SentencePiece the longest match, so é in two code points
        # and CR LF would differ. Mistral's and Llama's models replace nothing.
        f"the normalizer {normalizer.name!r}": bool(normalizer.precompiled_charsmap),
    }
    for what, found in refused.items():
        if found:
            raise MistralcError(
                f"The SentencePiece model {path} has {what}; expected a BPE model that leaves "
                "characters unchanged, like Mistral's and Llama's. Use a checkpoint with a "
                "tokenizer.json."
            )
    return Vocabulary(
        pieces=tuple(
            Piece(text=piece.piece, score=piece.score, type=PieceType(piece.type))
            for piece in proto.pieces
        ),
        bos_id=trainer.bos_id,
        eos_id=trainer.eos_id,
        add_dummy_prefix=normalizer.add_dummy_prefix,
        remove_extra_whitespaces=normalizer.remove_extra_whitespaces,
    )


def to_document(
    vocabulary: Vocabulary,
    *,
    prefix_everywhere: bool = False,
    rstrip: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """Return the `tokenizers` document with the same ids.

    `prefix_everywhere` is llama.cpp's rule: text after a user-defined piece gets the leading space
    too. `rstrip` are pieces after which spaces are dropped. Without `prefix_everywhere` one text is
    tokenized differently: a single user-defined piece (`[REF]`) and nothing else lacks the leading
    space that SentencePiece gives it.
    """
    ids = {piece.text: i for i, piece in enumerate(vocabulary.pieces)}
    if len(ids) != len(vocabulary.pieces):
        raise MistralcError(
            f"The vocabulary has {len(vocabulary.pieces)} pieces, but only {len(ids)} different "
            "ones; expected each piece once. The tokenizer file is damaged: download it again."
        )
    user_defined = _of_type(vocabulary, PieceType.USER_DEFINED)
    added_types = (PieceType.UNKNOWN, PieceType.CONTROL, PieceType.USER_DEFINED)
    unknown = _of_type(vocabulary, PieceType.UNKNOWN)
    prefixed = [] if prefix_everywhere else user_defined
    return document(
        vocabulary=ids,
        merges=_merges(vocabulary),
        added=[
            AddedToken(
                id=ids[text], content=text, special=text not in user_defined,
                normalized=False if prefix_everywhere else None, rstrip=text in rstrip,
            )
            for text in _of_type(vocabulary, *added_types)
        ],
        normalizer={"type": "Sequence", "normalizers": _normalizers(vocabulary, prefixed)},
        decoder={"type": "Sequence", "decoders": _decoders(vocabulary)},
        unk_token=unknown[0] if unknown else None,
        fuse_unk=True,
        byte_fallback=len(_of_type(vocabulary, PieceType.BYTE)) == 256,
    )  # fmt: skip


def _of_type(vocabulary: Vocabulary, *types: PieceType) -> list[str]:
    return [piece.text for piece in vocabulary.pieces if piece.type in types]


def _merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Return the merges: neighbours join into any normal piece, the best score first."""
    normal = (piece for piece in vocabulary.pieces if piece.type is PieceType.NORMAL)
    best_first = sorted(normal, key=lambda piece: -piece.score)
    ranks = {piece.text: rank for rank, piece in enumerate(best_first)}
    for text in ranks:
        missing = next((c for c in text if len(text) > 1 and c not in ranks), None)
        if missing is not None:
            raise MistralcError(
                f"The vocabulary has the piece {text!r} but not its character {missing!r}; "
                "expected every character of a piece to be a piece. Use a checkpoint with a "
                "tokenizer.json."
            )
    return merges_from_ranks(ranks)


def _normalizers(vocabulary: Vocabulary, user_defined: Sequence[str]) -> list[dict[str, Any]]:
    """Return the steps of SentencePiece's normalizer, in its order: extra spaces, prefix, spaces.

    A user-defined piece is matched in normalized text, and `tokenizers` normalizes the piece too.
    So the prefix must not change it, or the piece would match only after a space.
    """
    steps: list[dict[str, Any]] = []
    if vocabulary.remove_extra_whitespaces:  # at the end, a literal U+2581 is a space too
        ends, runs = rf"\A +|[ {SPACE}]+\z", " +"
        steps += [_replace({"Regex": ends}, ""), _replace({"Regex": runs}, " ")]
    if vocabulary.add_dummy_prefix and user_defined:
        alone = "|".join(map(re.escape, user_defined))
        steps.append(_replace({"Regex": rf"\A(?!(?:{alone})\z)"}, SPACE))
    elif vocabulary.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    return [*steps, _replace({"String": " "}, SPACE)]


def _decoders(vocabulary: Vocabulary) -> Iterable[dict[str, Any]]:
    steps = [_replace({"String": SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if vocabulary.add_dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return steps


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}
