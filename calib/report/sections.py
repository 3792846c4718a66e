"""Build the sections of a report on bundles: text, tables, figures. Knows no session.

Sections are plain data, which `to_html` writes as a self-contained page and `to_markdown` as text
for terminals. The same data gives the same bytes: they contain no times and no paths.

These facts of a calibration are used if they are present; NAME is a group's name:

    groups.NAME.error_before, .error   output error as a share of the output's power: rounded to
                                       nearest, and as calibrated
    groups.NAME.peak_before, .peak     largest input, before and after smoothing
    kept.kl_alone.NAME                 divergence in nats if only that group is quantized
    kept.groups                        names of the groups kept in higher precision
    coverage                           number of positions beyond each attention window
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from calib.report import figures
from calib.report.rows import BundleRow, pareto_front

TITLE = "Sizes and quality"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The data of a report: bundles, what they were measured on, and one table's facts.

    `calibration` describes the table of the facts. Without facts there are no sections on layers.
    """

    measured: tuple[BundleRow, ...]
    origin: Mapping[str, str]
    calibration: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A table of strings. The first column names the row; the others are numbers unless `words`."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: bool = False
    folded: bool = False  # collapsed on the page until opened


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading, a text, and possibly a figure and a table."""

    heading: str
    text: str
    figure: str = ""  # SVG
    grid: Grid | None = None


def build_sections(report: Report) -> tuple[Section, ...]:
    """Return all sections of the report in order, with their figures drawn."""
    found = [_comparison(report.measured), *_layer_sections(report), _origin(report)]
    return tuple(found)


def to_markdown(parts: Sequence[Section]) -> str:
    """Return the sections as Markdown, without figures."""
    lines = [f"# {TITLE}", ""]
    for part in parts:
        lines += [f"## {part.heading}", "", part.text, ""]
        if part.grid is not None:
            lines += [*grid_lines(part.grid), ""]
    return "\n".join(lines)


def grid_lines(grid: Grid) -> Iterator[str]:
    """Yield a table's lines in Markdown, with columns padded to equal width."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (grid.header, *grid.rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    marks = ["-" * w if not i or grid.words else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    for number, row in enumerate((cells[0], marks, *cells[1:])):
        padded = [
            cell.ljust(width) if number == 1 or not i or grid.words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield f"| {' | '.join(padded)} |"


def _comparison(measured: tuple[BundleRow, ...]) -> Section:
    best = pareto_front(measured)
    names = [one.name for one in best]
    text = (
        f"On the Pareto front: {_listed(names)}. No other bundle is better in both bytes and "
        "perplexity. Every token reads all weights once, which limits the speed of decoding; the "
        "KV ring is read in addition."
    )
    points = "; ".join(
        f"{one.name}: {one.read_bytes / 1e6:,.1f} MB, perplexity {one.perplexity:.2f}"
        for one in measured
    )
    compared = any(one.kl is not None for one in measured)
    header = ["bundle", "files (MB)", "read/token (MB)", "perplexity"]
    header += ["change", "KL (nats)", "top-1"] if compared else []
    grid = Grid(
        caption="Size and quality of each bundle; ● marks the Pareto front. KL is the divergence "
        "of the bundle from the checkpoint in float32, top-1 the share of positions where both "
        "prefer the same token."
        if compared
        else "Size and quality of each bundle; ● marks the Pareto front.",
        header=(*header, "front"),
        rows=tuple((*_row(one, compared=compared), "●" * (one in best)) for one in measured),
    )
    return Section(
        heading="Quality against bytes", text=text, grid=grid,
        figure=figures.pareto_figure(
            measured, f"On the front: {_listed(names)}. All points: {points}."
        ),
    )  # fmt: skip


def _row(one: BundleRow, *, compared: bool) -> Iterator[str]:
    yield one.name
    yield f"{one.file_bytes / 1e6:,.1f}"
    yield f"{one.read_bytes / 1e6:,.1f}"
    yield f"{one.perplexity:.3f}"
    if compared:
        yield "" if one.change is None else f"{one.change:+.2%}"
        yield "" if one.kl is None else f"{one.kl:.2e}"
        yield "" if one.top1 is None else f"{one.top1:.2%}"


def _layer_sections(report: Report) -> Iterator[Section]:
    numbers, kept = report.facts.get("groups") or {}, report.facts.get("kept") or {}
    error = {
        "to nearest": group_values(numbers, "error_before"),
        "calibrated": group_values(numbers, "error"),
    }
    if any(error.values()):
        yield _layered(
            "error", "Error of each layer", error, "error / output, power", "{:.2e}",
            "The output error of each group of linears from rounding, as a share of the output's "
            "power on the calibration text.",
        )  # fmt: skip
    peaks = {
        "before": group_values(numbers, "peak_before"),
        "smoothed": group_values(numbers, "peak"),
    }
    if any(peaks.values()):
        yield _layered(
            "range", "Ranges of activations", peaks, "largest |input|", "{:.3g}",
            "The largest input of each group of linears on the calibration text. Smoothing moves "
            "outliers into the weights.",
        )  # fmt: skip
    alone = {"divergence": positive_values(kept.get("kl_alone") or {})}
    if any(alone.values()):
        names = [".".join(name.split(".")[2:]) for name in kept.get("groups") or ()]
        yield _layered(
            "sensitivity", "Sensitivity", alone, "KL (nats)", "{:.2e}",
            "Divergence of the predictions from the checkpoint's if only that group is quantized. "
            f"Kept in higher precision, by layer: {_listed(names)}.",
        )  # fmt: skip


def group_values(numbers: Mapping[str, Any], name: str) -> dict[str, float]:
    """Return one fact for each group that has it."""
    return positive_values({group: facts.get(name) for group, facts in numbers.items()})


def positive_values(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers above 0, which are all that a logarithmic axis can show."""
    return {
        group: float(value)
        for group, value in values.items()
        if isinstance(value, int | float) and 0 < value < float("inf")
    }


def _layered(
    name: str, heading: str, series: Mapping[str, Mapping[str, float]], quantity: str, form: str,
    text: str,
) -> Section:  # fmt: skip
    """Build a section on numbers of every group: a figure, a summary, and a table."""
    shown = {label: values for label, values in series.items() if values}
    summary = " ".join(_summary(label, values, form) for label, values in shown.items())
    layers = sorted({int(group.split(".")[2]) for values in shown.values() for group in values})

    def cell(layer: int, kind: str) -> str:
        numbers = [figures.values_of_kind(values, kind).get(layer) for values in shown.values()]
        return " → ".join("" if number is None else form.format(number) for number in numbers)

    arrow = ": " + " → ".join(shown) if len(shown) > 1 else ""
    return Section(
        heading=heading,
        text=f"{text} {summary}",
        figure=figures.layer_figure(name, heading, shown, quantity, summary),
        grid=Grid(
            caption=f"{heading}, {quantity}{arrow}",
            header=("layer", *figures.GROUP_KINDS),
            rows=tuple(
                (str(layer), *(cell(layer, kind) for kind in figures.GROUP_KINDS))
                for layer in layers
            ),
            folded=True,
        ),
    )


def _summary(label: str, values: Mapping[str, float], form: str) -> str:
    worst = max(values, key=values.__getitem__)
    middle, most = form.format(median(values.values())), form.format(values[worst])
    short = ".".join(worst.split(".")[2:])
    return f"{label.capitalize()}: median {middle}, largest {most} (layer {short})."


def _origin(report: Report) -> Section:
    rows = [*report.origin.items(), *report.calibration.items()]
    for entry in report.facts.get("coverage") or ():
        size, beyond, tokens = entry["window"], entry["beyond"], entry["tokens"]
        name = "no attention window" if size is None else f"attention window {size:,}"
        rows.append(
            (f"calibration, {name}", f"{beyond:,} of {tokens:,} positions lie beyond it"
             if size is not None else f"{tokens:,} positions")
        )  # fmt: skip
    grid = Grid(
        caption="What was measured, and on what.",
        header=("fact", "value"),
        rows=tuple(rows),
        words=True,
    )
    return Section(
        heading="What this was measured on",
        text="Perplexities are comparable only for the same text and window length.",
        grid=grid,
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
