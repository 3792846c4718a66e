"""Hypothesis strategies that damage small valid files. Knows nothing about their readers.

The damage is structure-aware. Lengths and counts are replaced by extreme values in place. JSON is
edited as a tree and then serialized, including forms that JSON libraries do not write: duplicate
keys, numbers beyond every integer type, very deep nesting. A failing case shrinks to fewer edits.
"""

import copy
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]
Place = tuple[int, int]  # offset and width in bytes of a little-endian number

NUMBERS = (0, 1, -1, 2, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63,
           2**64 - 1, -(2**31), -(2**63))  # fmt: skip
DEEP = 3000  # levels; Python's recursion limit is 1000


@dataclass(frozen=True, slots=True)
class Raw:
    """Text that is copied into the JSON verbatim."""

    text: str


@dataclass(frozen=True, slots=True)
class DuplicateKey:
    """Two values of an object that are written under the same key."""

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
    """`data` after one to `most` edits; `places` locates its numbers."""

    def edited(seeds: list[bytes]) -> bytes:
        result = data
        for one in seeds:
            result = edit_bytes(_random(one), result, places)
        return result

    return _seeds(most).map(edited)


def _seeds(most: int) -> st.SearchStrategy[list[bytes]]:
    """One random seed per edit: hypothesis alone would not choose offsets uniformly."""
    return st.lists(st.binary(min_size=8, max_size=8), min_size=1, max_size=most)


def _random(seed: bytes) -> random.Random:
    return random.Random(seed)  # noqa: S311  (not used for security)


def edit_bytes(draw: random.Random, data: bytes, places: Sequence[Place] = ()) -> bytes:
    """`data` after one edit at a uniformly drawn offset; `places` locates its numbers."""
    edits = ["flip", "cut", "delete", "repeat", "splice", "overwrite", "number"]
    edit = draw.choice(edits if not places else [*edits, *["place"] * len(edits)])
    at, length = draw.randrange(max(1, len(data))), draw.randint(1, 64)
    if edit == "place":
        at, width = draw.choice(places)
        return _with_number(data, at, width, draw.choice((*NUMBERS, *_nearby(data, at, width))))
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


def _nearby(data: bytes, at: int, width: int) -> tuple[int, ...]:
    """Values close to the stored number, such as a length that is off by one."""
    there = int.from_bytes(data[at : at + width], "little")
    return there - 1, there + 1, there * 2, there + 8


def _with_number(data: bytes, at: int, width: int, number: int) -> bytes:
    written = (number % (1 << 8 * width)).to_bytes(width, "little")
    return data[:at] + written[: max(0, len(data) - at)] + data[at + width :]


def damaged_json(value: Any, most: int = 3) -> st.SearchStrategy[bytes]:
    """A JSON document after edits of its tree; one case in six also has its bytes edited."""

    def edited(seeds: list[bytes]) -> bytes:
        root = [copy.deepcopy(value)]
        for one in seeds:
            _edit_tree(_random(one), root)
        text = write(root[0]).encode("utf-8", errors="surrogatepass")
        draw = _random(seeds[0] + b"bytes")
        return text if draw.randrange(6) else edit_bytes(draw, text)

    return _seeds(most).map(edited)


def _edit_tree(draw: random.Random, root: list[Any]) -> None:
    """Replace, delete, duplicate, move or wrap one value, found by a random descent."""
    parent, key = _place(draw, root)
    edit = draw.choice(("replace", "replace", "replace", "delete", "duplicate", "move", "wrap"))
    leaf = copy.deepcopy(draw.choice(LEAVES))
    if edit == "replace":
        parent[key] = leaf
    elif edit == "delete" and parent is not root:
        del parent[key]
    elif edit == "duplicate" and isinstance(parent, dict):
        parent[key] = DuplicateKey(parent[key], leaf)
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
    """Serialize a tree to JSON text; `Raw` and `DuplicateKey` values are allowed."""
    if isinstance(value, dict):
        return "{" + ",".join(_entries(value)) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(write, value)) + "]"
    if isinstance(value, DuplicateKey):
        return write(value.first)
    return value.text if isinstance(value, Raw) else json.dumps(value, ensure_ascii=False)


def _entries(value: dict[str, Any]) -> Iterator[str]:
    for key, item in value.items():
        for one in (item.first, item.second) if isinstance(item, DuplicateKey) else (item,):
            yield f"{json.dumps(key)}:{write(one)}"
