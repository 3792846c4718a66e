"""Chunks of prompts that were computed before, by what stands up to them. Knows no session.

A chunk's keys and values depend on every token before it, so a chunk is found by the SHA-256 of
the whole text up to its end, taken chunk by chunk: two texts share chunks up to where they part.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from runtime.backends.session import Caches

Key = bytes  # SHA-256 of the text up to the chunk's end


class PrefixStore:
    """At most `limit` bytes of chunks in `kept`; what was not asked for longest goes first.

    A text's later chunks go before its earlier ones, without which they are of no use.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.nbytes = limit, 0
        self.kept: OrderedDict[Key, Caches] = OrderedDict()

    def keys(self, ids: Sequence[int], chunk: int) -> list[Key]:
        """The keys of the whole chunks of `ids`, in order."""
        digest = hashlib.sha256()
        found = []
        for end in range(chunk, len(ids) + 1, chunk):
            digest.update(array("q", ids[end - chunk : end]).tobytes())
            found.append(digest.digest())
        return found

    def wants(self, key: Key) -> bool:
        """Whether this chunk is not here yet and may be."""
        return self.limit > 0 and key not in self.kept

    def put(self, key: Key, caches: Caches) -> None:
        """Keep a chunk; nobody may write to it any more."""
        self.kept[key] = caches
        self.nbytes += _nbytes(caches)
        while self.nbytes > self.limit:
            self.nbytes -= _nbytes(self.kept.popitem(last=False)[1])

    def renew(self, keys: Sequence[Key]) -> None:
        """Note that the text with these keys was asked for."""
        for key in reversed(keys):
            if key in self.kept:
                self.kept.move_to_end(key)


def _nbytes(caches: Caches) -> int:
    return sum(cache.nbytes for cache in caches)
