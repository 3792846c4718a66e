"""Strategies that damage small real files where it hurts. Knows nothing about who reads them.

A failing case shrinks to fewer edits. It is structure-aware: numbers that say
how long or how many something is are replaced by extremes at exactly their places, and JSON is
edited as a tree before it is written, with what no JSON library would write: keys that are there
twice, numbers beyond every type, nesting without end.
"""

import copy
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]
Place = tuple[int, int]  # offset and width of a number, little endian

NUMBERS = (0, 1, -1, 2, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63,
           2**64 - 1, -(2**31), -(2**63))  # fmt: skip
DEEP = 3000  # levels; Python's recursion ends at 1000


@dataclass(frozen=True, slots=True)
class Raw:
    """Text that is written into JSON as it is."""

    text: str


@dataclass(frozen=True, slots=True)
class Twice:
    """An object's value that is written twice, under one key."""

    first: Any
    second: Any


LEAVES: tuple[Any, ...] = (
    None, True, False, *NUMBERS, 0.5, -0.5, 1e-300, 1e300, "", "x", "\0", "é", " ", "../../x",
    "/etc/passwd", "x" * 5000, [], {}, [[]], {"": None}, [None], ["x"], [0], {"x": 1},
    Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e999"), Raw("-0.0"), Raw("9" * 5000),
    Raw('"\\ud800"'), Raw("[" * DEEP + "]" * DEEP), Raw('{"a":' * DEEP + "1" + "}" * DEEP),
    Raw("nul"),
)  # fmt: skip


def damaged_bytes(
    data: bytes, places: Sequence[Place] = (), most: int = 3
) -> st.SearchStrategy[bytes]:
    """`data` after one to `most` edits; `places` are where its numbers lie."""

    def edited(seeds: list[bytes]) -> bytes:
        result = data
        for one in seeds:
            result = one_edit(_random(one), result, places)
        return result

    return _seeds(most).map(edited)


def _seeds(most: int) -> st.SearchStrategy[list[bytes]]:
    """One for each edit: places are drawn evenly, which hypothesis's own choices are not."""
    return st.lists(st.binary(min_size=8, max_size=8), min_size=1, max_size=most)


def _random(seed: bytes) -> random.Random:
    return random.Random(seed)  # noqa: S311  (nothing here is a secret)


def one_edit(draw: random.Random, data: bytes, places: Sequence[Place] = ()) -> bytes:
    """`data` after one edit, at a place drawn evenly; `places` are where its numbers lie."""
    edits = ["flip", "cut", "delete", "repeat", "splice", "overwrite", "number"]
    edit = draw.choice(edits if not places else [*edits, *["place"] * len(edits)])
    at, length = draw.randrange(max(1, len(data))), draw.randint(1, 64)
    if edit == "place":
        at, width = draw.choice(places)
        return _with_number(data, at, width, draw.choice((*NUMBERS, *_near(data, at, width))))
    if edit == "number":
        return _with_number(data, at, draw.choice((1, 2, 4, 8)), draw.choice(NUMBERS))
    if edit == "flip":
        bit = 1 << draw.randrange(8)
        return data[:at] + bytes(byte ^ bit for byte in data[at : at + 1]) + data[at + 1 :]
    if edit == "cut":
        return data[:at]
    if edit == "delete":
        return data[:at] + data[at + length :]
    if edit == "repeat":
        return data[:at] + data[at : at + length] * draw.randint(2, 50) + data[at + length :]
    if edit == "splice":
        other = draw.randrange(max(1, len(data)))
        return data[:at] + data[other : other + length] + data[at:]
    filler = draw.choice((b"\0", b"\xff", b"\x80", b'"', b"{", b"\n"))
    return data[:at] + filler * length + data[at + length :]


def _near(data: bytes, at: int, width: int) -> tuple[int, ...]:
    """The number that is there, a little less or more: lengths that lie by one."""
    there = int.from_bytes(data[at : at + width], "little")
    return there - 1, there + 1, there * 2, there + 8


def _with_number(data: bytes, at: int, width: int, number: int) -> bytes:
    written = (number % (1 << 8 * width)).to_bytes(width, "little")
    return data[:at] + written[: max(0, len(data) - at)] + data[at + width :]


def damaged_json(value: Any, most: int = 3) -> st.SearchStrategy[bytes]:
    """A JSON document after edits of its tree, and in one case of six of its bytes as well."""

    def edited(seeds: list[bytes]) -> bytes:
        root = [copy.deepcopy(value)]
        for one in seeds:
            _edit_tree(_random(one), root)
        text = write(root[0]).encode("utf-8", errors="surrogatepass")
        draw = _random(seeds[0] + b"bytes")
        return text if draw.randrange(6) else one_edit(draw, text)

    return _seeds(most).map(edited)


def _edit_tree(draw: random.Random, root: list[Any]) -> None:
    """Change, take out, double or move one value, at a place found by descent from the root."""
    parent, key = _place(draw, root)
    edit = draw.choice(("replace", "replace", "replace", "delete", "twice", "move", "wrap"))
    leaf = copy.deepcopy(draw.choice(LEAVES))
    if edit == "replace":
        parent[key] = leaf
    elif edit == "delete" and parent is not root:
        del parent[key]
    elif edit == "twice" and isinstance(parent, dict):
        parent[key] = Twice(parent[key], leaf)
    elif edit == "move":
        source, other = _place(draw, root)
        parent[key] = copy.deepcopy(source[other])
    else:
        parent[key] = [parent[key]]


def _place(draw: random.Random, root: list[Any]) -> tuple[Any, Any]:
    parent: Any = root
    key: Any = 0
    while isinstance(parent[key], dict | list) and parent[key] and draw.randrange(8):
        parent = parent[key]
        key = draw.choice(list(parent)) if isinstance(parent, dict) else draw.randrange(len(parent))
    return parent, key


def write(value: Any) -> str:
    """JSON text of a tree, with `Raw` and `Twice` in it."""
    if isinstance(value, dict):
        return "{" + ",".join(_entries(value)) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(write, value)) + "]"
    if isinstance(value, Twice):
        return write(value.first)
    return value.text if isinstance(value, Raw) else json.dumps(value, ensure_ascii=False)


def _entries(value: dict[str, Any]) -> Iterator[str]:
    for key, item in value.items():
        for one in (item.first, item.second) if isinstance(item, Twice) else (item,):
            yield f"{json.dumps(key)}:{write(one)}"
