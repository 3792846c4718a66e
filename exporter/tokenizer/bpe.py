"""A byte-pair vocabulary as a `tokenizers` document. Knows nothing about where it came from."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

P = TypeVar("P", str, bytes)


def merges_from_ranks(ranks: Mapping[P, int]) -> list[tuple[P, P]]:
    """Every way to join two pieces into a third, in the order in which they are to be tried.

    SentencePiece and tiktoken join whichever neighbours make the best-ranked piece, however it
    is cut; a `tokenizers` document lists pairs. So every cut of a piece into two pieces is a
    merge, with the merged piece's rank. Both programs take the leftmost of equals, and a run
    such as `aaa` is then cut as `aa` + `a`: hence the longest left part first.
    """
    found: list[tuple[int, int, P, P]] = []
    lengths = {len(piece) for piece in ranks}  # a piece of a megabyte is not to be cut everywhere
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
    """A token found in text as it stands. `special` ones are control tokens, not text."""

    id: int
    content: str
    special: bool = True

    def entry(self) -> dict[str, Any]:
        """Its entry in the document. One that is text is looked for after normalization."""
        return {
            "id": self.id,
            "content": self.content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": not self.special,
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
    """The document; `model` overrides the options of `tokenizers`' BPE model."""
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
