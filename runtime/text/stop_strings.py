r"""Find stop strings in streamed text. Knows nothing about tokens.

A stop string may be spread over several pieces, so text that could be its beginning is held back
until the next characters decide. With the stop strings "<end>" and "\n\n":

    push("Hello <e")   ->  "Hello "       "<e" could become "<end>"
    push("m>\n")       ->  "<em>"         it did not; the line break could become "\n\n"
    push("\nmore")     ->  "", stopped    it did, so the line breaks and the rest are dropped

The stop string that is complete first wins; if two are complete at the same character, the longer
one. The result is the same however the text is cut into pieces.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from graphs.errors import UsageError


class Pushed(NamedTuple):
    """Text that can be sent, possibly empty, and whether a stop string ended it."""

    text: str
    stopped: bool


class StopStrings:
    """Finds the first stop string in one stream. Raises UsageError if one of them is empty.

    An Aho-Corasick automaton (CACM 18(6), 1975): a state is the longest beginning of a stop string
    that the text so far ends with. So the state spells the text that is held back, and each
    character takes amortized constant time, however long the stop strings are.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str):
            raise UsageError(
                f"The stop strings are the single string {stops!r}; a list of strings is expected. "
                "Put it in a list."
            )
        if "" in stops:
            raise UsageError(
                "A stop string is empty; it would end every text before it begins. At least one "
                "character is expected; leave the option out to have no stop string."
            )
        self.matched: str | None = None  # the stop string that ended the text
        self._next: list[dict[str, int]] = [{}]  # the trie: state -> character -> state
        self._spelling: list[str] = [""]  # a stop string that begins with the state's text
        self._depth: list[int] = [0]  # length of the state's text
        self._found: list[str | None] = [None]  # the longest stop string that ends here
        for stop in stops:
            self._add(stop)
        self._fallback = [0] * len(self._next)  # the longest other state this one ends with
        self._link()
        self._state = 0

    def push(self, text: str) -> Pushed:
        """Take the next piece; return the text that cannot become part of a stop string any more.

        After a stop string the result is always ("", True).
        """
        if self.matched is not None:
            return Pushed("", True)
        before, state = self._state, self._state
        for count, character in enumerate(text, start=1):
            state = self._step(state, character)
            if (found := self._found[state]) is not None:
                self.matched = found
                return Pushed(self._released(before, text, count, len(found)), True)
        self._state = state
        return Pushed(self._released(before, text, len(text), self._depth[state]), False)

    def flush(self) -> str:
        """Return the text still held back, once the stream has ended without a stop string."""
        held = "" if self.matched is not None else self._held(self._state)
        self._state = 0
        return held

    def _add(self, stop: str) -> None:
        state = 0
        for depth, character in enumerate(stop, start=1):
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._spelling.append(stop)
                self._depth.append(depth)
                self._found.append(None)
            state = self._next[state][character]
        self._found[state] = stop

    def _link(self) -> None:
        """Fill `_fallback`, shallow states before deep ones."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for character, child in self._next[state].items():
                self._fallback[child] = self._step(self._fallback[state], character)
                self._found[child] = self._found[child] or self._found[self._fallback[child]]
                queue.append(child)

    def _step(self, state: int, character: str) -> int:
        while state and character not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(character, 0)

    def _held(self, state: int) -> str:
        return self._spelling[state][: self._depth[state]]

    def _released(self, before: int, text: str, count: int, withheld: int) -> str:
        """Text held in state `before` plus `count` characters of `text`, minus the last `withheld`.

        Only the returned text is built. Otherwise each small piece inside a long stop string would
        cost the length of that stop string.
        """
        held = self._depth[before]
        size = held + count - withheld
        if size <= held:
            return self._spelling[before][:size]
        return self._held(before) + text[: size - held]
