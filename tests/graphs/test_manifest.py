"""The manifest of a bundle: one text for one meaning, and every change of it refused."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from graphs.errors import MistralcError
from graphs.manifest import CHECKSUM, Manifest, parse_manifest, read_manifest


@pytest.mark.parametrize("bundle_name", ["sliding_bundle", "plain_bundle"])
def test_a_manifest_written_and_read_is_the_same(
    bundle_name: str, request: pytest.FixtureRequest
) -> None:
    bundle: Path = request.getfixturevalue(bundle_name)
    manifest = read_manifest(bundle)
    assert Manifest.from_text(manifest.to_text(), "manifest.json") == manifest
    assert manifest.to_text() == (bundle / "manifest.json").read_text(encoding="utf-8")


def test_a_manifest_with_any_byte_changed_is_refused(sliding_bundle: Path) -> None:
    # Such as the window's "8" becoming a "9", a space a tab, or a float's last digit another.
    data = (sliding_bundle / "manifest.json").read_bytes()
    for i in range(len(data)):
        flipped = data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]
        with pytest.raises(MistralcError):
            parse_manifest(flipped, sliding_bundle)


def test_a_manifest_cut_short_anywhere_is_refused(sliding_bundle: Path) -> None:
    data = (sliding_bundle / "manifest.json").read_bytes()
    for end in range(len(data)):
        with pytest.raises(MistralcError, match=r"is not a bundle's manifest|was changed after"):
            parse_manifest(data[:end], sliding_bundle)


@pytest.mark.parametrize(
    "layout",
    [
        lambda text: json.dumps(json.loads(text), sort_keys=True),
        lambda text: text.replace('"schema"', '"\\u0073chema"', 1),
        lambda text: text.replace("{", '{"schema": 1,', 1),
        lambda text: text + "\n",
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "\ufeff" + text,
    ],
    ids=["compact", "escaped", "a field twice", "a line more", "CRLF", "byte order mark"],
)
def test_a_manifest_that_says_the_same_in_another_layout_is_refused(
    sliding_bundle: Path, layout: Callable[[str], str]
) -> None:
    # What is signed is bytes, and what is read is what they say: one text for one meaning.
    text = (sliding_bundle / "manifest.json").read_text(encoding="utf-8")
    with pytest.raises(MistralcError, match=r"is not a bundle's manifest|was changed after"):
        parse_manifest(layout(text).encode(), sliding_bundle)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"schema": 2}, r"schema 2 .* newer version"),
        ({"schema": "one"}, r"schema 'one' .* another version"),
        ({"surprise": 1}, "manifest_sha256"),
        ({"files": None}, "manifest_sha256"),
        ({CHECKSUM: None}, "manifest_sha256"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_manifest_of_another_form_is_refused_with_the_reason(
    sliding_bundle: Path, change: Mapping[str, Any], expected: str
) -> None:
    text = (sliding_bundle / "manifest.json").read_text(encoding="utf-8")
    with pytest.raises(MistralcError, match=expected):
        Manifest.from_text(json.dumps({**json.loads(text), **change}), "manifest.json")


@pytest.mark.parametrize("text", ["", "[]", "1", "null", '"text"', "{}", "[" * 100_000, "1" * 5000])
def test_what_is_no_manifest_at_all_is_refused(text: str) -> None:
    with pytest.raises(MistralcError, match=r"manifest\.json is not a bundle's manifest"):
        Manifest.from_text(text, "manifest.json")
