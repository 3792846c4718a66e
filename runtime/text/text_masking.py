"""Mask the caller's text so that it cannot form control tokens. Knows nothing about templates.

A control token in a rendered chat counts only if the template wrote it. So every character of the
caller's text that occurs in a control token is replaced, one for one, by a character used nowhere
else: its *mask*. Whatever a template does with masked text (cut, join, repeat), the result contains
no control token. After rendering, the masks are replaced by the original characters.

    control tokens [INST] and </s>, caller's text "x [INST]"     x ①②③④⑤⑥  (② is I, ④ is S, ...)

To the template, masked text must look like the original, so `MaskedText` compares, searches and
splits as the original would. Text that loses this class on the way is still masked, so still safe.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

_FIRST_MASK = 0x100000  # Supplementary Private Use Area-B

_UNMASKED_METHODS = (
    "__contains__", "__eq__", "__ge__", "__gt__", "__le__", "__lt__", "__ne__",
    "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha",
    "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable",
    "istitle", "isupper", "lower", "partition", "removeprefix", "removesuffix", "replace",
    "rfind", "rindex", "rpartition", "rsplit", "split", "splitlines", "startswith", "swapcase",
    "title", "upper",
)  # fmt: skip


class Mask:
    """A mask for every character of `alphabet`; no mask occurs in `texts`."""

    def __init__(self, alphabet: Collection[str], texts: Iterable[str]) -> None:
        taken = set().union(*texts)
        points = (chr(point) for point in range(_FIRST_MASK, 0x110000))
        free = (character for character in points if character not in taken)
        self._to_mask = {ord(c): next(free) for c in sorted(alphabet)}
        self._to_text = {ord(mask): chr(c) for c, mask in self._to_mask.items()}

    def hide(self, value: Any) -> Any:
        """Return `value` with every string in it masked, keys included."""
        match value:
            case str():
                return MaskedText.of(value.translate(self._to_mask), self)
            case Mapping():
                return {self.hide(key): self.hide(item) for key, item in value.items()}
            case list() | tuple():
                return type(value)(map(self.hide, value))
            case _:
                return value

    def reveal(self, value: Any) -> Any:
        """Unmask a string, or the strings in a tuple; return anything else unchanged."""
        if isinstance(value, tuple):
            return tuple(map(self.reveal, value))
        return value.translate(self._to_text) if isinstance(value, str) else value


class MaskedText(str):
    """Masked text that behaves like its original in everything that chat templates do."""

    _mask: Mask

    @classmethod
    def of(cls, text: str, mask: Mask) -> "MaskedText":
        """Wrap `text`, which is already masked or was written by the template."""
        masked = cls(text)
        masked._mask = mask
        return masked

    def __hash__(self) -> int:
        return hash(self._mask.reveal(self))

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> str:
        return self.of(str.__add__(self, other), self._mask)

    def __radd__(self, other: str) -> str:
        return self.of(str.__add__(other, self), self._mask)

    def __getitem__(self, key: Any) -> str:
        return self.of(str.__getitem__(self, key), self._mask)


def _strip_method(name: str) -> Callable[..., str]:
    """Make `strip`, `lstrip` or `rstrip`: removes masked and unmasked characters alike."""
    method = getattr(str, name)

    def call(self: MaskedText, chars: str | None = None, /) -> str:
        mask = self._mask
        either = None if chars is None else "".join((mask.reveal(chars), mask.hide(chars)))
        return MaskedText.of(method(self, either), mask)

    return call


def _unmasked_method(name: str) -> Callable[..., Any]:
    """Make a method of `str` that runs on the original; a string that it returns is masked."""
    method = getattr(str, name)

    def call(self: MaskedText, *args: Any, **options: Any) -> Any:
        mask = self._mask
        result = method(mask.reveal(self), *map(mask.reveal, args), **options)
        return mask.hide(result)

    return call


for _name in ("strip", "lstrip", "rstrip"):
    setattr(MaskedText, _name, _strip_method(_name))
for _name in _UNMASKED_METHODS:
    setattr(MaskedText, _name, _unmasked_method(_name))


def join(parts: Iterable[str]) -> str:
    """Join a template's output; the result is `MaskedText` if any part is."""
    strings = list(parts)
    mask = next((part._mask for part in strings if isinstance(part, MaskedText)), None)
    text = "".join(strings)
    return text if mask is None else MaskedText.of(text, mask)


def strings_in(value: Any) -> Iterable[str]:
    """Yield every string in nested lists and mappings, keys included."""
    match value:
        case str():
            yield value
        case Mapping():
            for key, item in value.items():
                yield from strings_in(key)
                yield from strings_in(item)
        case list() | tuple():
            for item in value:
                yield from strings_in(item)
