"""Chunks of prompts that were computed before, by what stands up to them. Knows no session.

A chunk's keys and values depend on every token before it, so a chunk is found by the SHA-256 of
the whole text up to its end, taken chunk by chunk: two texts share chunks up to where they part.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from runtime.session import Caches

Key = bytes  # SHA-256 of the text up to the chunk's end


class PrefixStore:
    """At most `limit` bytes of chunks; what was not asked for longest goes first.

    A text's later chunks go before its earlier ones, without which they are of no use.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.nbytes = limit, 0
        self._kept: OrderedDict[Key, tuple[Caches, int]] = OrderedDict()

    def keys(self, ids: Sequence[int], chunk: int) -> list[Key]:
        """The keys of the whole chunks of `ids`, in order."""
        digest = hashlib.sha256()
        found = []
        for end in range(chunk, len(ids) + 1, chunk):
            digest.update(array("q", ids[end - chunk : end]).tobytes())
            found.append(digest.digest())
        return found

    def get(self, key: Key) -> Caches | None:
        """The chunk's keys and values, if they are here; not to be written to."""
        found = self._kept.get(key)
        return None if found is None else found[0]

    def wants(self, key: Key) -> bool:
        """Whether this chunk is not here yet and may be."""
        return self.limit > 0 and key not in self._kept

    def put(self, key: Key, caches: Caches) -> None:
        """Keep a chunk."""
        nbytes = sum(cache.nbytes for cache in caches)
        self._kept[key] = caches, nbytes
        self.nbytes += nbytes
        while self.nbytes > self.limit:
            _, (_, nbytes) = self._kept.popitem(last=False)
            self.nbytes -= nbytes

    def renew(self, keys: Sequence[Key]) -> None:
        """Note that the text with these keys was asked for."""
        for key in reversed(keys):
            if key in self._kept:
                self._kept.move_to_end(key)
