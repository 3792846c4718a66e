r"""Finds stop strings in streamed text. Knows nothing about tokens or where the text comes from.

A stop string may lie across pieces, so the text that could be its beginning is held back until
the next characters decide. With the stops "<end>" and "\n\n":

    push("Hello <e")   ->  "Hello "       "<e" could become "<end>"
    push("m>\n")       ->  "<em>"         it did not; the line break could become "\n\n"
    push("\nmore")     ->  "", stopped    it did: neither it nor what follows is text

The stop that is complete first wins; of two complete at the same character, the longer. That
is what reading character by character finds, so how the text is cut into pieces never matters.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from graphs.errors import UsageError


class Pushed(NamedTuple):
    """Text that is certain, possibly empty, and whether a stop string ended it."""

    text: str
    stopped: bool


class StopStrings:
    """Where one stream stands with respect to its stop strings.

    An Aho-Corasick automaton (CACM 18(6), 1975): a state is a beginning of some stop string, the
    longest one that the text so far ends with. So the held-back text is the state's own spelling
    and each character costs amortized constant time, however long the stops are.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str):
            raise UsageError(
                f"The stop strings are the single text {stops!r}; a list of texts is expected. "
                "Put it in a list."
            )
        if "" in stops:
            raise UsageError(
                "A stop string is empty; it would end every text before it begins. At least one "
                "character is expected: leave the option out to stop at nothing."
            )
        self.matched: str | None = None  # the stop string that was met
        self._next: list[dict[str, int]] = [{}]  # the trie: state -> character -> state
        self._spelling: list[str] = [""]  # a stop string that begins with this state's text
        self._depth: list[int] = [0]  # characters of it
        self._found: list[str | None] = [None]  # the longest stop string that ends here
        for stop in stops:
            self._add(stop)
        self._fallback = [0] * len(self._next)  # the longest other state this one ends with
        self._link()
        self._state = 0

    def push(self, text: str) -> Pushed:
        """Take the next piece of text; return what can no longer become part of a stop string.

        After a stop every piece gives ("", True).
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
        """The text still held back, once the stream has ended without a stop."""
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
        """Fill `_fallback` from the shallow states to the deep ones."""
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
        """What was held in state `before` and `count` characters of text, less the `withheld`.

        Never more is built than is returned, or many small pieces of a long stop would cost its
        length each.
        """
        held = self._depth[before]
        size = held + count - withheld
        if size <= held:
            return self._spelling[before][:size]
        return self._held(before) + text[: size - held]
