"""Text that knows which of its characters a chat template wrote. Knows nothing about templates.

`TracedText` is the true text, so a template computes with it what it computes with a `str`: it
compares, searches, hashes and serializes as one. Beside the text it carries one byte for each
character, its origin, and the methods that return text carry the origins along. A plain `str` is a
message's text. What a method without rules of its own returns is plain, hence a message's too: an
unknown operation may lose a control token of the template, and cannot make one of a message.

    template "[INST]", message "hi"      [INST]hi
                                         22222200
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self, SupportsIndex

from markupsafe import Markup

MESSAGE, NEUTRAL, TEMPLATE = 0, 1, 2  # neutral: numbers and roles, which may be a part of a token
_FIELD = re.compile(r"%(?:\((?P<key>[^)]*)\))?(?P<form>[^a-zA-Z%]*)(?P<kind>[a-zA-Z%])")


class TracedText(str):
    """Text with the origin of each character. Built from text alone, it is a message's."""

    _origins: bytes
    __slots__ = ("_origins",)

    def __new__(cls, text: str = "", origins: bytes | None = None) -> Self:
        """Raises ValueError unless there is one origin for each character."""
        traced = super().__new__(cls, text)
        traced._origins = bytes(len(traced)) if origins is None else origins
        if len(traced._origins) != len(traced):
            raise ValueError(f"{len(traced)} characters have {len(traced._origins)} origins")
        return traced

    def __str__(self) -> str:
        return self

    def __iter__(self) -> Iterator[str]:
        pairs = zip(super().__iter__(), self._origins, strict=True)
        return (TracedText(character, bytes((origin,))) for character, origin in pairs)

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        text = super().__getitem__(key)
        return TracedText(
            text, self._origins[key] if isinstance(key, slice) else bytes((self._origins[key],))
        )

    def __add__(self, other: str) -> str:
        if not isinstance(other, str) or isinstance(other, Markup):
            return NotImplemented  # Markup escapes what it is added to
        return TracedText(super().__add__(other), self._origins + origins_of(other))

    def __radd__(self, other: str) -> str:
        return TracedText(str.__add__(other, self), origins_of(other) + self._origins)

    def __mul__(self, times: SupportsIndex) -> str:
        return TracedText(super().__mul__(times), self._origins * times.__index__())

    __rmul__ = __mul__

    def __mod__(self, values: Any) -> str:
        text = super().__mod__(values)
        try:
            return verified(text, self._formatted(values))
        except (TypeError, ValueError, LookupError, StopIteration):  # a form without a rule here
            return text

    def _formatted(self, values: Any) -> Iterator[str]:
        """Yield the pieces of `self % values`; a field with a width is formatted alone."""
        rest, position = iter(values if isinstance(values, tuple) else (values,)), 0
        for field in _FIELD.finditer(self):
            yield self[position : field.start()]
            position = field.end()
            if field["kind"] == "%":
                yield self[position - 1 : position]
                continue
            value = next(rest) if field["key"] is None else values[field["key"]]
            if field["kind"] == "s":
                yield respaced(text_of(value), str.__mod__("%" + field["form"] + "s", (value,)))
            elif field["kind"] == "r" and not field["form"]:
                yield repr_of(value)
            else:
                result = str.__mod__("%" + field["form"] + field["kind"], (value,))
                yield result if field["kind"] == "c" else _neutral(result, value)
        yield self[position:]

    def join(self, parts: Iterable[str], /) -> str:
        """As `str.join`."""
        listed = list(parts)
        text = super().join(listed)
        return TracedText(text, self._origins.join(map(origins_of, listed)))

    def replace(self, old: str, new: str, *count: Any, **options: Any) -> str:
        """As `str.replace`."""
        text = super().replace(old, new, *count, **options)
        times = int(*count, *options.values()) if count or options else -1
        if old:
            pieces = super().split(old, times)
            kept = map(origins_of, _cut(self, pieces, len(old)))
            return TracedText(text, origins_of(new).join(kept))
        places = len(self) + 1 if times < 0 else min(times, len(self) + 1)
        origins = b"".join(
            origins_of(new) * (i < places) + self._origins[i : i + 1] for i in range(len(self) + 1)
        )
        return TracedText(text, origins)

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """As `str.split`."""
        return _cut(self, super().split(sep, maxsplit), len(sep) if sep else None)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """As `str.rsplit`."""
        return _cut(self, super().rsplit(sep, maxsplit), len(sep) if sep else None)

    def splitlines(self, keepends: bool = False) -> list[str]:
        """As `str.splitlines`."""
        return _cut(self, super().splitlines(keepends), None)

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        """As `str.partition`."""
        first, between, last = _cut(self, super().partition(sep), 0)
        return first, between, last

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        """As `str.rpartition`."""
        first, between, last = _cut(self, super().rpartition(sep), 0)
        return first, between, last

    def lstrip(self, chars: str | None = None, /) -> str:
        """As `str.lstrip`."""
        return self[len(self) - len(super().lstrip(chars)) :]

    def rstrip(self, chars: str | None = None, /) -> str:
        """As `str.rstrip`."""
        return self[: len(super().rstrip(chars))]

    def strip(self, chars: str | None = None, /) -> str:
        """As `str.strip`."""
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix: str, /) -> str:
        """As `str.removeprefix`."""
        return self[len(self) - len(super().removeprefix(prefix)) :]

    def expandtabs(self, *tabsize: Any, **options: Any) -> str:
        """As `str.expandtabs`."""
        return respaced(self, super().expandtabs(*tabsize, **options))

    def removesuffix(self, suffix: str, /) -> str:
        """As `str.removesuffix`."""
        return self[: len(super().removesuffix(suffix))]


def _changed_case(name: str) -> Callable[..., str]:
    method = getattr(str, name)

    def call(self: TracedText) -> str:
        return recased(self, method(self))

    return call


def _padded(name: str) -> Callable[..., str]:
    method = getattr(str, name)

    def call(self: TracedText, *args: Any) -> str:
        result = method(self, *args)
        added = len(result) - len(self)
        before = {"ljust": 0, "rjust": added, "zfill": added}.get(name)
        if before is None:
            before = max(0, str.find(str.center("x" * len(self), len(result)), "x"))
        if str.__ne__(result[before : before + len(self)], self):
            return str(result)  # zeros after a sign
        return TracedText(result, bytes(before) + self._origins + bytes(added - before))

    return call


for _name in ("capitalize", "casefold", "lower", "swapcase", "title", "upper"):
    setattr(TracedText, _name, _changed_case(_name))
for _name in ("center", "ljust", "rjust", "zfill"):
    setattr(TracedText, _name, _padded(_name))


class SafeText(Markup):
    """What the filter `safe` returns: text that is not escaped, with its origins."""

    _origins: bytes | None = None

    @classmethod
    def of(cls, value: Any) -> "SafeText":
        """Mark the text of `value` as safe."""
        text = text_of(value)
        safe = cls(text)
        safe._origins = origins_of(text)
        return safe


SafeText.__name__ = Markup.__name__  # which a template sees in the text of a list


def origins_of(text: str) -> bytes:
    """Return the origin of each character of `text`."""
    origins = getattr(text, "_origins", None)
    return bytes(len(text)) if origins is None else origins


def text_of(value: Any) -> str:
    """Return `str(value)`, traced."""
    if isinstance(value, Markup):
        return TracedText(str.__str__(value), origins_of(value))
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple | dict):
        return repr_of(value)
    return _neutral(str(value), value)


def repr_of(value: Any) -> str:
    """Return `repr(value)`, traced."""
    return written(value, repr(value), _PYTHON_STRING, repr)


def _neutral(text: str, value: Any) -> str:
    """Return the text of a number, which is neutral, or of another value, which is a message's."""
    is_number = value is None or isinstance(value, int | float)
    return TracedText(text, bytes((NEUTRAL,)) * len(text)) if is_number else text


def from_template(text: str) -> TracedText:
    """Return text that the template wrote itself."""
    return TracedText(text, bytes((TEMPLATE,)) * len(text))


def join(parts: Iterable[str]) -> TracedText:
    """Join texts."""
    listed = list(parts)
    return TracedText("".join(listed), b"".join(map(origins_of, listed)))


def verified(text: str, pieces: Iterable[str]) -> str:
    """Return the joined pieces if they are `text`; else `text`, as a message's."""
    joined = join(pieces)
    return joined if str.__eq__(joined, text) else text


def recased(source: str, result: str) -> str:
    """Trace a change of case; one that changes the length (`ß`) loses the origins."""
    return TracedText(result, origins_of(source)) if len(result) == len(source) else result


def respaced(source: str, result: str) -> str:
    """Trace a change of white space only: what is not white space keeps its order and origins."""
    if source == result:
        return source
    if "".join(str.split(source)) != "".join(str.split(result)):
        return result
    kept = (
        o for c, o in zip(str.__iter__(source), origins_of(source), strict=True) if not c.isspace()
    )
    return TracedText(result, bytes(MESSAGE if str.isspace(c) else next(kept) for c in result))


def _cut(source: TracedText, pieces: Iterable[str], gap: int | None) -> list[str]:
    """Trace pieces of `source`, in order and `gap` characters apart.

    None: apart by characters that no piece begins with, except one at the very beginning.
    """
    cut: list[str] = []
    position = 0
    for piece in pieces:
        start = str.find(source, piece, position) if gap is None else position
        cut.append(TracedText(piece, source._origins[start : start + len(piece)]))
        position = start + len(piece) + (gap or 0)
    return cut


_PYTHON_STRING = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)


def written(value: Any, result: str, literal: re.Pattern[str], encode: Callable[[str], str]) -> str:
    """Trace the strings in `value` written by `encode` into `result`, in order, as `literal`s.

    The rest of `result` is a message's, and all of it if its literals are not these strings.
    """
    try:
        strings = list(_strings_in(value))
    except TypeError:
        return result
    if not any(map(any, map(origins_of, strings))):
        return result
    matches = list(literal.finditer(result))
    if len(matches) != len(strings):
        return result
    origins = bytearray(len(result))
    for text, match in zip(strings, matches, strict=True):
        if encode(text) == match[0]:
            lengths = [len(encode(c)) - 2 for c in str.__iter__(text)]
            if sum(lengths) < len(match[0]) - 2:  # `repr` escapes ' only beside "
                lengths = [n + (c == "'") for c, n in zip(str.__iter__(text), lengths, strict=True)]
            if sum(lengths) == len(match[0]) - 2:
                levels = (bytes((o,)) * n for o, n in zip(origins_of(text), lengths, strict=True))
                origins[match.start() + 1 : match.end() - 1] = b"".join(levels)
    return TracedText(result, bytes(origins))


def _strings_in(value: Any) -> Iterator[str]:
    """Yield every string in nested lists and mappings, keys included, in order.

    Raises TypeError for a value whose text may itself hold literals.
    """
    match value:
        case str():
            yield value
        case dict():
            for key, item in value.items():
                yield from _strings_in(key)
                yield from _strings_in(item)
        case list() | tuple():
            for item in value:
                yield from _strings_in(item)
        case None | bool() | int() | float():
            pass
        case _:
            raise TypeError(type(value))
