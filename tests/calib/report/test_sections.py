"""Sections of a report: tables, texts, figures, Markdown."""

import math
from dataclasses import replace

import pytest

from calib.report.figures import values_of_kind
from calib.report.page import to_html
from calib.report.sections import Report, Section, build_sections, grid_lines, to_markdown
from tests.calib.report.samples import (
    EIGHT,
    FLOAT,
    FOUR,
    bundle,
    full_report,
    text_labels,
)


@pytest.fixture(scope="module")
def parts() -> tuple[Section, ...]:
    return build_sections(full_report())


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
    grid = build_sections(Report(measured=(alone,), origin={}))[0].grid
    assert grid is not None
    assert grid.header == ("bundle", "files (MB)", "read/token (MB)", "perplexity", "front")


def test_an_infinite_perplexity_is_listed_but_not_drawn():
    broken = replace(FOUR, name="broken", perplexity=math.inf)
    part = build_sections(Report(measured=(broken, FLOAT), origin={}))[0]
    assert part.grid is not None
    assert part.grid.rows[0][3] == "inf"
    assert part.grid.rows[0][-1] == "", "a row of infinite perplexity is never on the front"
    assert text_labels(part.figure).count("broken") == 0


@pytest.mark.parametrize("values", [(10.0, 12.0), (10.0, 300.0), (10.0,)])
def test_every_bundle_is_named_once_in_the_figure(values: tuple[float, ...]):
    rows = tuple(bundle(f"name {at}", 10**8 - at, value) for at, value in enumerate(values))
    drawn = text_labels(build_sections(Report(measured=rows, origin={}))[0].figure)
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
    assert "Kept in higher precision, by layer: 1.down." in sensitivity.text
    assert "largest 1.20e-02 (layer 2.down)" in sensitivity.text


def test_missing_facts_have_no_section():
    for given, expected in [
        ({}, 2),
        ({"groups": {}, "coverage": [], "kept": None}, 2),
        ({"groups": {"model.layers.0.qkv": {}}}, 2),
        ({"groups": {"model.layers.0.qkv": {"error": 0.0}}}, 2),
        ({"groups": {"model.layers.0.qkv": {"error": 0.1}}}, 3),
        ({"groups": {"model.layers.0.o": {"error": 0.1, "peak": 3.0}}}, 4),
    ]:
        found = build_sections(Report(measured=(FLOAT,), origin={}, facts=given))
        assert len(found) == expected, given
        to_html(found)
        to_markdown(found)


def test_layers_are_in_numerical_order():
    values = {f"model.layers.{layer}.o": float(layer) for layer in (10, 2, 1)}
    assert list(values_of_kind(values, "o").items()) == [(1, 1.0), (2, 2.0), (10, 10.0)]
    assert values_of_kind(values, "qkv") == {}


def test_coverage_counts_the_positions_beyond_a_window(parts: tuple[Section, ...]):
    grid = parts[-1].grid
    assert grid is not None
    assert ("calibration, attention window 4,096",
            "4,096 of 20,480 positions lie beyond it") in grid.rows  # fmt: skip


def test_markdown_has_every_section_and_number_of_the_page(parts: tuple[Section, ...]):
    text = to_markdown(parts)
    for part in parts:
        assert f"## {part.heading}\n" in text
        assert part.grid is not None
        for row in part.grid.rows:
            for cell in row:
                assert cell in text
    assert "svg" not in text


def test_columns_of_markdown_are_aligned():
    grid = build_sections(Report(measured=(replace(FOUR, name="a|b"), EIGHT), origin={}))[0].grid
    assert grid is not None
    lines = list(grid_lines(grid))
    assert len({len(line) for line in lines}) == 1
    assert lines[2].startswith("| a\\|b ")
    assert set(lines[1]) == set("|-: ")
