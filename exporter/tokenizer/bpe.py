"""Write a byte-pair vocabulary as a `tokenizers` document. Knows nothing about file formats."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

P = TypeVar("P", str, bytes)


def merges_from_ranks(ranks: Mapping[P, int]) -> list[tuple[P, P]]:
    """Return every pair of pieces that joins into a third, in the order of their priority.

    SentencePiece and tiktoken join the neighbours that make the best-ranked piece, wherever it is
    split; a `tokenizers` document lists pairs. So every split of a piece into two pieces is a merge
    with the rank of the whole piece. Among equals both programs take the leftmost, which splits a
    run such as `aaa` into `aa` + `a`. Therefore the longest left part comes first.
    """
    found: list[tuple[int, int, P, P]] = []
    lengths = {len(piece) for piece in ranks}  # so a piece of a megabyte is not split everywhere
    for piece, rank in ranks.items():
        for cut in range(len(piece) - 1, 0, -1):
            if cut not in lengths or len(piece) - cut not in lengths:
                continue
            left, right = piece[:cut], piece[cut:]
            if left in ranks and right in ranks:
                found.append((rank, -cut, left, right))
    found.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in found]


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedToken:
    """A token that is matched in text literally. `special` ones are control tokens, not text.

    `normalized` None means that only text is: a token that is text is matched after normalization.
    """

    id: int
    content: str
    special: bool = True
    normalized: bool | None = None
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    def entry(self) -> dict[str, Any]:
        """Return its entry in the document."""
        return {
            "id": self.id,
            "content": self.content,
            "single_word": self.single_word,
            "lstrip": self.lstrip,
            "rstrip": self.rstrip,
            "normalized": not self.special if self.normalized is None else self.normalized,
            "special": self.special,
        }


def document(
    *,
    vocabulary: Mapping[str, int],
    merges: Iterable[tuple[str, str]],
    added: Iterable[AddedToken],
    normalizer: dict[str, Any] | None = None,
    pre_tokenizer: dict[str, Any] | None = None,
    decoder: dict[str, Any],
    **model: Any,
) -> dict[str, Any]:
    """Return the document; `model` overrides options of the BPE model of `tokenizers`."""
    options = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [token.entry() for token in sorted(added, key=lambda token: token.id)],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": {**options, **model, "vocab": dict(vocabulary), "merges": list(merges)},
    }
