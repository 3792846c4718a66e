"""The HTML page of a report: self-contained, safe, accessible, reproducible."""

import re
from html.parser import HTMLParser

import pytest

from calib.report.figures import INK, THEME
from calib.report.page import to_html
from calib.report.sections import Section, build_sections
from tests.calib.report.samples import (
    SVG,
    full_report,
    parsed,
)


@pytest.fixture(scope="module")
def parts() -> tuple[Section, ...]:
    return build_sections(full_report())


@pytest.fixture(scope="module")
def page(parts: tuple[Section, ...]) -> str:
    return to_html(parts)


class Tags(HTMLParser):
    """Collects tags with their attributes, and checks that they are properly nested."""

    void = frozenset({"meta", "link", "img", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_self_contained(page: str):
    tags = Tags(page).found
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in tags}
    for _, attributes in tags:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "@import" not in page
    assert "@font-face" not in page
    assert set(re.findall(r"url\((.)", page)) <= {"#"}


def test_ids_are_unique_and_no_reference_is_dangling(page: str):
    ids = [attributes["id"] for _, attributes in Tags(page).found if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = re.findall(r'href="#([^"]+)"', page) + re.findall(r"url\(#([^)]+)\)", page)
    assert used
    assert set(used) <= set(ids)


def test_names_of_bundles_and_texts_are_escaped(page: str):
    assert "<i>bad" not in page
    assert "<b>text" not in page
    assert "a &lt;b&gt;text&lt;/b&gt; &amp; more" in page


def test_figures_use_the_colours_of_the_page_in_light_and_dark_mode(page: str):
    assert not [stand_in for stand_in in THEME if stand_in in page]
    assert THEME[INK] in page
    names = set(re.findall(r"var\((--[a-z]+)\)", page))
    light, dark = page.split("prefers-color-scheme: dark", 1)
    for name in names:
        assert f"{name}:" in light, name
        assert f"{name}:" in dark, name
    drawn = re.findall(r"(?:fill|stroke): (#[0-9a-f]+)", page)
    assert drawn == [], "a fixed colour may be invisible in one of the modes"


def luminance(colour: str) -> float:
    """Relative luminance of `#rgb` or `#rrggbb`, as WCAG 2.2 defines it."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    linear = [
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for value in (int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4))
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_and_lines_have_enough_contrast_in_both_modes(page: str):
    light, dark = re.findall(r":root \{(.*?)\}", page, re.DOTALL)
    for ground in (light, dark):
        colours = dict(re.findall(r"--([a-z]+): (#[0-9a-f]+)", ground))
        for name in ("ink", "quiet", "first", "second"):
            for under in ("ground", "stripe"):
                pair = sorted((luminance(colours[name]), luminance(colours[under])))
                # 4.5 is the contrast of text in WCAG 2.2, level AA; lines need 3.
                assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, (name, under)


def test_every_figure_and_table_has_a_text_for_screen_readers(
    page: str, parts: tuple[Section, ...]
):
    tags = Tags(page).found
    figures = [attributes for tag, attributes in tags if tag == "svg"]
    assert len(figures) == 4
    ids = {attributes.get("id") for _, attributes in tags}
    for figure in figures:
        assert figure["role"] == "img"
        assert set((figure["aria-labelledby"] or "").split()) <= ids
    for part in parts[:4]:
        words = parsed(part.figure)
        assert words.findtext(f"{SVG}title")
        assert re.search(r"\d", words.findtext(f"{SVG}desc") or ""), (
            "the description has to contain numbers"
        )
    counted = [tag for tag, _ in tags]
    assert counted.count("caption") == counted.count("table") == 5
    assert ("html", {"lang": "en"}) in tags


def test_the_same_data_gives_the_same_bytes(page: str, monkeypatch: pytest.MonkeyPatch):
    import matplotlib as mpl

    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    with mpl.rc_context({"font.size": 30, "axes.grid": False, "svg.hashsalt": "another"}):
        again = to_html(build_sections(full_report()))
        assert mpl.rcParams["font.size"] == 30, "the user's settings are restored"
    assert again == page
    assert not re.search(r"20\d\d-\d\d", page), "the page must not contain a date"
