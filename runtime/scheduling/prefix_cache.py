"""Keep computed chunks of prompts, found by the text up to their end. Knows nothing about sessions.

A chunk's keys and values depend on every token before it. So a chunk's key is the SHA-256 of all
tokens up to its end, hashed chunk by chunk: two texts share chunks up to where they differ.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.backends.session import Caches

PREFIX_BYTES = 1 << 29  # default limit: 11,000 tokens of SmolLM2, 4,000 of Mistral-7B
Key = bytes  # SHA-256 of the tokens up to the chunk's end


class PrefixCache:
    """At most `limit` bytes of chunks, in `kept`; the least recently used goes first.

    A text's later chunks go before its earlier ones, because they are useless without those.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.nbytes = limit, 0
        self.kept: OrderedDict[Key, Caches] = OrderedDict()

    def keys(self, ids: Sequence[int], chunk: int) -> list[Key]:
        """Return the keys of the whole chunks of `ids`, in order."""
        digest = hashlib.sha256()
        keys = []
        for end in range(chunk, len(ids) + 1, chunk):
            digest.update(array("q", ids[end - chunk : end]).tobytes())
            keys.append(digest.digest())
        return keys

    def wants(self, key: Key) -> bool:
        """Whether the chunk should be stored: it is not here yet, and the cache is not off."""
        return self.limit > 0 and key not in self.kept

    def put(self, key: Key, caches: "Caches") -> None:
        """Store a chunk; its arrays must not be changed afterwards."""
        self.kept[key] = caches
        self.nbytes += _nbytes(caches)
        while self.nbytes > self.limit:
            self.nbytes -= _nbytes(self.kept.popitem(last=False)[1])

    def touch(self, keys: Sequence[Key]) -> None:
        """Mark the chunks of one text as just used."""
        for key in reversed(keys):
            if key in self.kept:
                self.kept.move_to_end(key)


def _nbytes(caches: "Caches") -> int:
    return sum(cache.nbytes for cache in caches)
