"""What a comparison of bundles says: tables, figures, and where they are from. Knows no session.

A report is sections of plain data, which `to_html` writes as one page that needs nothing else, and
`to_markdown` for terminals. The same data gives the same bytes: no time, no path is in them.

Of a calibration's facts these are used, each where it is there; NAME is a group's:

    groups.NAME.error_before, .error   share of the output's power that rounding changes: to the
                                       nearest code, and as calibrated
    groups.NAME.peak_before, .peak     largest input seen, before and after smoothing
    kept.kl_alone.NAME                 divergence in nats with that group alone quantized
    kept.groups                        names of the groups that were left in higher precision
    coverage                           how many positions lie beyond each attention window
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from calib.report import figures as figures
from calib.report.rows import Measured, front

TITLE = "Sizes and quality"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What is reported: bundles, what they were measured on in words, and one table's facts.

    `calibration` says what the facts are of. Without facts there are no sections about layers.
    """

    measured: tuple[Measured, ...]
    origin: Mapping[str, str]
    calibration: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A table of words. The first column names the row; the rest are numbers unless `words`."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: bool = False
    folded: bool = False  # a page shows it when asked to


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading, what is to be seen in words, and perhaps a figure and a table that shows it."""

    heading: str
    text: str
    figure: str = ""  # SVG
    grid: Grid | None = None


def sections(report: Report) -> tuple[Section, ...]:
    """Everything that the report says, in order; figures are drawn here."""
    found = [_comparison(report.measured), *_by_group(report), _origin(report)]
    return tuple(found)


def to_markdown(parts: Sequence[Section]) -> str:
    """The sections without their figures."""
    lines = [f"# {TITLE}", ""]
    for part in parts:
        lines += [f"## {part.heading}", "", part.text, ""]
        if part.grid is not None:
            lines += [*grid_lines(part.grid), ""]
    return "\n".join(lines)


def grid_lines(grid: Grid) -> Iterator[str]:
    """A table's lines in Markdown, columns padded so that they stand under each other."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (grid.header, *grid.rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    marks = ["-" * w if not i or grid.words else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    for number, row in enumerate((cells[0], marks, *cells[1:])):
        padded = [
            cell.ljust(width) if number == 1 or not i or grid.words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield f"| {' | '.join(padded)} |"


def _comparison(measured: tuple[Measured, ...]) -> Section:
    best = front(measured)
    names = [one.name for one in best]
    text = (
        "On the front, which no other bundle beats in both bytes and perplexity: "
        f"{_listed(names)}. Every token reads all weights once, which bounds the speed of "
        "decoding; the KV ring comes on top."
    )
    points = "; ".join(
        f"{one.name}: {one.read_bytes / 1e6:,.1f} MB, perplexity {one.perplexity:.2f}"
        for one in measured
    )
    compared = any(one.kl is not None for one in measured)
    header = ["bundle", "files (MB)", "read/token (MB)", "perplexity"]
    header += ["change", "KL (nats)", "top-1"] if compared else []
    grid = Grid(
        caption="Size and quality of each bundle; ● is on the front. KL is of the bundle from the "
        "checkpoint in float32, top-1 the share of positions where both prefer the same token."
        if compared
        else "Size and quality of each bundle; ● is on the front.",
        header=(*header, "front"),
        rows=tuple((*_row(one, compared=compared), "●" * (one in best)) for one in measured),
    )
    return Section(
        heading="Quality against bytes", text=text, grid=grid,
        figure=figures.pareto(measured, f"On the front: {_listed(names)}. All points: {points}."),
    )  # fmt: skip


def _row(one: Measured, *, compared: bool) -> Iterator[str]:
    yield one.name
    yield f"{one.file_bytes / 1e6:,.1f}"
    yield f"{one.read_bytes / 1e6:,.1f}"
    yield f"{one.perplexity:.3f}"
    if compared:
        yield "" if one.change is None else f"{one.change:+.2%}"
        yield "" if one.kl is None else f"{one.kl:.2e}"
        yield "" if one.top1 is None else f"{one.top1:.2%}"


def _by_group(report: Report) -> Iterator[Section]:
    numbers, kept = report.facts.get("groups") or {}, report.facts.get("kept") or {}
    error = {
        "to nearest": by_group(numbers, "error_before"),
        "calibrated": by_group(numbers, "error"),
    }
    if any(error.values()):
        yield _layered(
            "error", "Error of each layer", error, "error / output, power", "{:.2e}",
            "What rounding changes in the output of each group of linears, as a share of that "
            "output's power on the calibration text.",
        )  # fmt: skip
    peaks = {"before": by_group(numbers, "peak_before"), "smoothed": by_group(numbers, "peak")}
    if any(peaks.values()):
        yield _layered(
            "range", "Ranges of activations", peaks, "largest |input|", "{:.3g}",
            "The largest input that each group of linears saw in the calibration text. Smoothing "
            "moves outliers into the weights.",
        )  # fmt: skip
    alone = {"divergence": positive(kept.get("kl_alone") or {})}
    if any(alone.values()):
        names = [".".join(name.split(".")[2:]) for name in kept.get("groups") or ()]
        yield _layered(
            "sensitivity", "Sensitivity", alone, "KL (nats)", "{:.2e}",
            "How far the predictions move from the checkpoint's when that group alone is "
            f"quantized. Left in higher precision, by layer: {_listed(names)}.",
        )  # fmt: skip


def by_group(numbers: Mapping[str, Any], name: str) -> dict[str, float]:
    """One fact of each group that has it."""
    return positive({group: facts.get(name) for group, facts in numbers.items()})


def positive(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers above 0: a logarithmic axis has no place for others."""
    return {
        group: float(value)
        for group, value in values.items()
        if isinstance(value, int | float) and 0 < value < float("inf")
    }


def _layered(
    name: str, heading: str, series: Mapping[str, Mapping[str, float]], quantity: str, form: str,
    text: str,
) -> Section:  # fmt: skip
    """A section about numbers of every group: a figure, its gist in words, and all the numbers."""
    there = {label: values for label, values in series.items() if values}
    gist = " ".join(_gist(label, values, form) for label, values in there.items())
    layers = sorted({int(group.split(".")[2]) for values in there.values() for group in values})

    def cell(layer: int, kind: str) -> str:
        numbers = [figures.of_kind(values, kind).get(layer) for values in there.values()]
        return " → ".join("" if number is None else form.format(number) for number in numbers)

    arrow = ": " + " → ".join(there) if len(there) > 1 else ""
    return Section(
        heading=heading,
        text=f"{text} {gist}",
        figure=figures.by_layer(name, heading, there, quantity, gist),
        grid=Grid(
            caption=f"{heading}, {quantity}{arrow}",
            header=("layer", *figures.KINDS),
            rows=tuple(
                (str(layer), *(cell(layer, kind) for kind in figures.KINDS)) for layer in layers
            ),
            folded=True,
        ),
    )


def _gist(label: str, values: Mapping[str, float], form: str) -> str:
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
        caption="What was measured, on what.",
        header=("fact", "value"),
        rows=tuple(rows),
        words=True,
    )
    return Section(
        heading="What this was measured on",
        text="Perplexities of other texts, or of windows of another length, do not compare.",
        grid=grid,
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
