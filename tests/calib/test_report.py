"""`mistralc report`: what it says of given numbers, that it needs nothing else, and the command."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from calib.report.figures import INK, THEME, of_kind
from calib.report.page import to_html
from calib.report.rows import Measured, distinct, front, name_of
from calib.report.sections import Report, Section, grid_lines, sections, to_markdown
from exporter.checkpoint.open import open_checkpoint
from exporter.export import ExportOptions, export
from exporter.quantization.calibration_table import CalibrationTable
from graphs.manifest import Manifest
from graphs.quant_scheme import default_scheme, groups
from graphs.spec import ModelSpec, RingSpec
from runtime.bundle.sizes import read_bytes
from tests.conftest import Command
from tests.support.make_checkpoint import tiny_spec

SVG = "{http://www.w3.org/2000/svg}"
KINDS = ("qkv", "o", "gate_up", "down")


def bundle(name: str, read: int, perplexity: float, **more: Any) -> Measured:
    return Measured(
        name=name, precision=name, method="", file_bytes=read + 1000, read_bytes=read,
        perplexity=perplexity, **more,
    )  # fmt: skip


FLOAT = bundle("fp32", 400_000_000, 10.0, reference_perplexity=10.0, kl=1e-10, top1=1.0)
EIGHT = bundle("int8wo", 120_000_000, 10.1, reference_perplexity=10.0, kl=1e-3, top1=0.99)
FOUR = bundle("int4wo awq", 70_000_000, 10.8, reference_perplexity=10.0, kl=0.05, top1=0.9)
WORSE = bundle(
    "int8 <i>nearest</i>", 121_000_000, 11.0, reference_perplexity=10.0, kl=0.1, top1=0.8
)
ALL = (FLOAT, EIGHT, FOUR, WORSE)


def facts(layers: int = 3) -> dict[str, Any]:
    """Of every group: an error that calibration halved, a range that smoothing took to a tenth."""
    names = [f"model.layers.{layer}.{kind}" for layer in range(layers) for kind in KINDS]
    return {
        "groups": {
            name: {"error_before": 0.02 / at, "error": 0.01 / at, "peak_before": 500.0 / at,
                   "peak": 50.0 / at}
            for at, name in enumerate(names, start=1)
        },
        "kept": {"groups": ["model.layers.1.down"],
                 "kl_alone": {name: 0.001 * at for at, name in enumerate(names, start=1)}},
        "coverage": [{"window": 4096, "tokens": 20_480, "beyond": 4096}],
    }  # fmt: skip


def full() -> Report:
    origin = {"text": "a <b>text</b> & more", "windows": "2 of 512"}
    return Report(measured=ALL, origin=origin, calibration={"calibration": "awq"}, facts=facts())


@pytest.fixture(scope="module")
def parts() -> tuple[Section, ...]:
    return sections(full())


@pytest.fixture(scope="module")
def page(parts: tuple[Section, ...]) -> str:
    return to_html(parts)


# What is said


def test_the_front_has_what_nothing_beats_in_bytes_and_perplexity_at_once():
    assert front(ALL) == (FOUR, EIGHT, FLOAT)
    assert front(()) == ()
    equal = replace(EIGHT, name="the same bytes, worse", perplexity=10.2)
    assert front((equal, EIGHT)) == (EIGHT,)
    no_better = replace(EIGHT, name="more bytes, no better", read_bytes=EIGHT.read_bytes + 1)
    assert front((no_better, EIGHT)) == (EIGHT,)


def test_rows_of_equal_names_are_told_apart_by_their_bundles():
    names = [one.name for one in distinct((EIGHT, FOUR, EIGHT), ("a", "b", "c"))]
    assert names == ["int8wo (a)", "int4wo awq", "int8wo (c)"]


def manifest_of(spec: ModelSpec, quantization: dict[str, Any] | None) -> Manifest:
    return Manifest(
        target="cpu", precision="int4wo", activation="float32", model=spec,
        ring=RingSpec(chunk=8, context=64), window_source="checkpoint", checkpoint={},
        versions={}, files={}, quantization=quantization,
    )  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_a_token_reads_every_weight_once_but_one_row_of_an_embedding_of_its_own(tied: bool):
    spec = tiny_spec(tie_word_embeddings=tied)
    every = 4 * spec.num_parameters
    unread = 0 if tied else 4 * (spec.vocab_size - 1) * spec.hidden_size
    assert read_bytes(manifest_of(spec, None)) == every - unread


def test_a_token_reads_codes_scales_and_zero_points_of_what_is_quantized():
    spec = tiny_spec(tie_word_embeddings=True)
    scheme = default_scheme("int4wo", block=32, offset="zero_point")
    names = [name for group in groups(spec) for name in group.readers]
    stored = {"schemes": {name: scheme.to_json() for name in names},
              "layouts": dict.fromkeys(names, "nbits"), "method": "awq"}  # fmt: skip
    linears, expected = 0, 0
    for name in names:
        n, k = spec.weight_shapes()[name]
        blocks = k // 32  # 2 or 3: no block is filled up
        linears += n * k
        expected += n * k // 2 + 4 * n * blocks + n * -(-blocks // 2)  # packed: two to a byte
    manifest = manifest_of(spec, stored)
    assert read_bytes(manifest) == expected + 4 * (spec.num_parameters - linears)
    assert name_of(manifest) == "int4wo awq block 32"


def test_the_table_of_bundles_has_sizes_quality_and_the_front(parts: tuple[Section, ...]):
    grid = parts[0].grid
    assert grid is not None
    assert grid.header == ("bundle", "files (MB)", "read/token (MB)", "perplexity", "change",
                           "KL (nats)", "top-1", "front")  # fmt: skip
    assert grid.rows[2] == ("int4wo awq", "70.0", "70.0", "10.800", "+8.00%", "5.00e-02", "90.00%",
                            "●")  # fmt: skip
    assert [row[-1] for row in grid.rows] == ["●", "●", "●", ""]


def test_without_a_reference_there_are_no_columns_for_it():
    alone = replace(FOUR, reference_perplexity=None, kl=None, top1=None)
    grid = sections(Report(measured=(alone,), origin={}))[0].grid
    assert grid is not None
    assert grid.header == ("bundle", "files (MB)", "read/token (MB)", "perplexity", "front")


def test_a_perplexity_beyond_a_float_is_said_and_not_drawn():
    broken = replace(FOUR, name="broken", perplexity=math.inf)
    part = sections(Report(measured=(broken, FLOAT), origin={}))[0]
    assert part.grid is not None
    assert part.grid.rows[0][3] == "inf"
    assert part.grid.rows[0][-1] == "", "infinitely bad is not on the front, however small"
    assert texts(part.figure).count("broken") == 0


@pytest.mark.parametrize("values", [(10.0, 12.0), (10.0, 300.0), (10.0,)])
def test_every_bundle_is_named_once_in_the_figure(values: tuple[float, ...]):
    rows = tuple(bundle(f"name {at}", 10**8 - at, value) for at, value in enumerate(values))
    drawn = texts(sections(Report(measured=rows, origin={}))[0].figure)
    for one in rows:
        assert drawn.count(one.name) == 1


def test_layers_are_reported_by_kind_of_group_before_and_after(parts: tuple[Section, ...]):
    headings = [part.heading for part in parts]
    assert headings == ["Quality against bytes", "Error of each layer", "Ranges of activations",
                        "Sensitivity", "What this was measured on"]  # fmt: skip
    error, ranges, sensitivity = parts[1:4]
    assert error.grid is not None
    assert error.grid.rows[0][:2] == ("0", "2.00e-02 → 1.00e-02")
    assert "Calibrated: median 1.55e-03, largest 1.00e-02 (layer 0.qkv)." in error.text
    assert "Before: median 77.4, largest 500 (layer 0.qkv)." in ranges.text
    assert "Left in higher precision, by layer: 1.down." in sensitivity.text
    assert "largest 1.20e-02 (layer 2.down)" in sensitivity.text


def test_of_facts_that_are_missing_nothing_is_said():
    for given, expected in [
        ({}, 2),
        ({"groups": {}, "coverage": [], "kept": None}, 2),
        ({"groups": {"model.layers.0.qkv": {}}}, 2),
        ({"groups": {"model.layers.0.qkv": {"error": 0.0}}}, 2),
        ({"groups": {"model.layers.0.qkv": {"error": 0.1}}}, 3),
        ({"groups": {"model.layers.0.o": {"error": 0.1, "peak": 3.0}}}, 4),
    ]:
        found = sections(Report(measured=(FLOAT,), origin={}, facts=given))
        assert len(found) == expected, given
        to_html(found)
        to_markdown(found)


def test_layers_are_in_numerical_order():
    values = {f"model.layers.{layer}.o": float(layer) for layer in (10, 2, 1)}
    assert list(of_kind(values, "o").items()) == [(1, 1.0), (2, 2.0), (10, 10.0)]
    assert of_kind(values, "qkv") == {}


def test_coverage_says_how_much_lies_beyond_a_window(parts: tuple[Section, ...]):
    grid = parts[-1].grid
    assert grid is not None
    assert ("calibration, attention window 4,096",
            "4,096 of 20,480 positions lie beyond it") in grid.rows  # fmt: skip


# The page


class Tags(HTMLParser):
    """Collects tags with their attributes, and checks that what is opened is closed in order."""

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


def texts(svg: str) -> list[str]:
    return ["".join(text.itertext()) for text in parsed(svg).iter(f"{SVG}text")]


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)  # noqa: S314 - drawn here


def test_the_page_is_whole_and_asks_for_nothing_else(page: str):
    tags = Tags(page).found
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in tags}
    for _, attributes in tags:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "@import" not in page
    assert "@font-face" not in page
    assert set(re.findall(r"url\((.)", page)) <= {"#"}


def test_no_two_figures_share_an_id_and_no_reference_is_dangling(page: str):
    ids = [attributes["id"] for _, attributes in Tags(page).found if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = re.findall(r'href="#([^"]+)"', page) + re.findall(r"url\(#([^)]+)\)", page)
    assert used
    assert set(used) <= set(ids)


def test_what_bundles_and_texts_are_called_cannot_break_the_page(page: str):
    assert "<i>bad" not in page
    assert "<b>text" not in page
    assert "a &lt;b&gt;text&lt;/b&gt; &amp; more" in page


def test_figures_have_the_colours_of_the_page_on_a_light_ground_and_a_dark_one(page: str):
    assert not [stand_in for stand_in in THEME if stand_in in page]
    assert THEME[INK] in page
    names = set(re.findall(r"var\((--[a-z]+)\)", page))
    light, dark = page.split("prefers-color-scheme: dark", 1)
    for name in names:
        assert f"{name}:" in light, name
        assert f"{name}:" in dark, name
    drawn = re.findall(r"(?:fill|stroke): (#[0-9a-f]+)", page)
    assert drawn == [], "a fixed colour vanishes on one of the grounds"


def luminance(colour: str) -> float:
    """Relative luminance of `#rgb` or `#rrggbb`, as WCAG 2.2 defines it."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    linear = [
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for value in (int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4))
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_and_lines_stand_out_from_both_grounds(page: str):
    light, dark = re.findall(r":root \{(.*?)\}", page, re.DOTALL)
    for ground in (light, dark):
        colours = dict(re.findall(r"--([a-z]+): (#[0-9a-f]+)", ground))
        for name in ("ink", "quiet", "first", "second"):
            for under in ("ground", "stripe"):
                pair = sorted((luminance(colours[name]), luminance(colours[under])))
                # 4.5 is WCAG 2.2's contrast of text at level AA; lines need 3.
                assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, (name, under)


def test_every_figure_and_table_says_what_it_is_to_those_who_do_not_see_it(
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
        assert re.search(r"\d", words.findtext(f"{SVG}desc") or ""), "numbers, not a promise"
    counted = [tag for tag, _ in tags]
    assert counted.count("caption") == counted.count("table") == 5
    assert ("html", {"lang": "en"}) in tags


def test_the_same_data_make_the_same_bytes(page: str, monkeypatch: pytest.MonkeyPatch):
    import matplotlib as mpl

    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    with mpl.rc_context({"font.size": 30, "axes.grid": False, "svg.hashsalt": "another"}):
        again = to_html(sections(full()))
        assert mpl.rcParams["font.size"] == 30, "the user's settings are given back"
    assert again == page
    assert not re.search(r"20\d\d-\d\d", page), "there is a date in it"


def test_markdown_has_every_section_and_number_of_the_page(parts: tuple[Section, ...]):
    text = to_markdown(parts)
    for part in parts:
        assert f"## {part.heading}\n" in text
        assert part.grid is not None
        for row in part.grid.rows:
            for cell in row:
                assert cell in text
    assert "svg" not in text


def test_columns_of_markdown_stand_under_each_other():
    grid = sections(Report(measured=(replace(FOUR, name="a|b"), EIGHT), origin={}))[0].grid
    assert grid is not None
    lines = list(grid_lines(grid))
    assert len({len(line) for line in lines}) == 1
    assert lines[2].startswith("| a\\|b ")
    assert set(lines[1]) == set("|-: ")


# The command


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("The ring turns. " * 8, encoding="utf-8")
    return file


def test_report_measures_bundles_and_writes_a_page_and_a_text(
    mistralc: Command, plain_bundle: Path, rounded_bundle: Path, plain_checkpoint: Path,
    text: Path, tmp_path: Path,
):  # fmt: skip
    out = tmp_path / "made" / "report"
    words = ("report", plain_bundle, rounded_bundle, "--against", plain_checkpoint, "--text", text,
             "--length", 40, "--limit", 2, "-o", out)  # fmt: skip
    ended = mistralc(*words, "--json")
    assert ended.code == 0, ended.err
    result = json.loads(ended.out)
    assert [one["name"] for one in result["measured"]] == [
        "fp32", "int8wo round to nearest block 32"
    ]  # fmt: skip
    plain, rounded = result["measured"]
    assert plain["kl"] < 1e-10 < rounded["kl"], "see tests/calib/test_evaluate.py"
    assert rounded["read_bytes"] < plain["read_bytes"] < plain["file_bytes"]
    assert result["measured_on"]["text"] == "text.txt"
    assert result["measured_on"]["windows"].startswith("2 of 40 tokens")
    page, markdown = (out / name for name in ("index.html", "report.md"))
    assert "int8wo round to nearest block 32" in page.read_text(encoding="utf-8")
    assert str(tmp_path) not in page.read_text(encoding="utf-8") + markdown.read_text("utf-8")
    before = page.read_bytes(), markdown.read_bytes()
    ended = mistralc(*words)
    assert ended.code == 0, ended.err
    assert (page.read_bytes(), markdown.read_bytes()) == before
    assert ended.out.startswith("| bundle ")
    assert str(page) in ended.out.splitlines()[-1]


def test_report_perplexity_is_that_of_eval(
    mistralc: Command, plain_bundle: Path, text: Path, tmp_path: Path
):
    words = (plain_bundle, "--text", text, "--length", 40, "--json")
    found = json.loads(mistralc("report", *words, "-o", tmp_path / "report").out)
    alone = json.loads(mistralc("eval", *words).out)
    assert found["measured"][0]["perplexity"] == alone["perplexity"]
    assert found["measured"][0]["kl"] is None


@pytest.mark.usefixtures("kept_traces")
def test_report_shows_the_table_that_a_bundle_was_made_with(
    mistralc: Command, plain_checkpoint: Path, plain_bundle: Path, text: Path, tmp_path: Path
):
    spec = open_checkpoint(str(plain_checkpoint)).spec
    scheme = default_scheme("int8wo", block=32)
    table = CalibrationTable(
        precision="int8wo", method="by hand", data={"source": "a story", "windows": 3},
        checkpoint=open_checkpoint(str(plain_checkpoint)).fingerprint(), versions={"python": "3"},
        schemes={name: scheme for group in groups(spec) for name in group.readers},
        tensors={}, facts=facts(layers=2),
    )  # fmt: skip
    folder, made = tmp_path / "table", tmp_path / "bundle"
    folder.mkdir()
    table.write(folder)
    options = ExportOptions(precision="int8wo", calibration=folder, context=96, chunk=8)
    export(str(plain_checkpoint), made, options)
    words = ("--text", text, "--length", 40, "--table", folder, "-o", tmp_path / "report")
    ended = mistralc("report", made, *words)
    assert ended.code == 0, ended.err
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    for expected in ("Error of each layer", "int8wo by hand", "a story (windows 3)"):
        assert expected in page
    refused = mistralc("report", plain_bundle, *words)
    assert refused.code == 2
    assert "none of the bundles was made with it" in refused.err


def test_report_refuses_before_it_measures(
    mistralc: Command, plain_bundle: Path, text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr("runtime.load.load", None)  # loading would be a TypeError
    file = tmp_path / "file"
    file.write_text("", encoding="utf-8")
    for words, code, expected in [
        ((), 2, "holds 96 in all"),  # windows of 512
        (("--text", text, "--length", 40, "--table", tmp_path), 1, "is not a calibration table"),
        (("--text", text, "-o", file), 2, "cannot be made a directory"),
        (("--text", text, "--length", 1), 2, "greater than or equal to 2"),
    ]:
        destination = () if "-o" in words else ("-o", tmp_path / "report")
        ended = mistralc("report", plain_bundle, *words, *destination)
        assert (ended.code, ended.out) == (code, ""), ended.err
        assert expected in ended.err
    ended = mistralc("report", tmp_path / "nothing", "-o", tmp_path / "report")
    assert ended.code == 1
    assert ended.err.startswith("mistralc: There is no bundle at ")


def test_bundles_that_read_a_text_differently_are_not_compared(
    mistralc: Command, plain_bundle: Path, text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    from exporter.checks import corpus

    read, calls = corpus.read_corpus, []

    def differing(*arguments: Any) -> corpus.Corpus:
        found = read(*arguments)
        calls.append(found)
        documents = tuple(ids[len(calls) - 1 :] for ids in found.documents)
        return replace(found, documents=documents)

    monkeypatch.setattr(corpus, "read_corpus", differing)
    words = ("--text", text, "--length", 40, "-o", tmp_path / "report")
    ended = mistralc("report", plain_bundle, plain_bundle, *words)
    assert ended.code == 2
    assert "make different tokens of the same text" in ended.err


def test_without_matplotlib_the_report_says_how_to_get_it(
    mistralc: Command, plain_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ended = mistralc("report", plain_bundle, "-o", tmp_path / "report")
    assert ended.code == 1
    assert "pip install 'mistralc[report]'" in ended.err
    assert not (tmp_path / "report").exists()
