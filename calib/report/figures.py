"""Draw the report's figures as SVG for inclusion in its page.

Colours refer to names that the page defines, so one figure works in light and dark mode: matplotlib
draws in placeholder colours, which are then replaced in the SVG. Text stays text in the page's
font. The same data gives the same bytes.
"""

import importlib.util
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from calib.report.rows import BundleRow, pareto_front
from graphs.errors import MistralcError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GROUP_KINDS: Mapping[str, str] = {
    "qkv": "query, key, value", "o": "output of attention", "gate_up": "gate, up",
    "down": "output of the feed-forward",
}  # fmt: skip
"""The groups of a layer in the order of computation, with their labels."""

INK, FAINT, FIRST, SECOND = "#010203", "#010204", "#010205", "#010206"
THEME: Mapping[str, str] = {
    INK: "currentColor", FAINT: "var(--faint)", FIRST: "var(--first)", SECOND: "var(--second)",
}  # fmt: skip
"""Placeholder colours while matplotlib draws, and the page's colours that replace them."""

STYLE: Mapping[str, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "mistralc", "font.size": 10,
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "axes.titlesize": 10,
    "xtick.color": INK, "ytick.color": INK, "grid.color": FAINT, "grid.linewidth": 0.6,
    "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "savefig.transparent": True,
}  # fmt: skip
MAX_LINEAR_RATIO = 10.0  # largest ratio of perplexities shown on a linear axis
LABEL_OFFSETS = (9, -10, 20, -21, 31, -32, 42, -43)  # pixels upwards: the label clears the line
LINES: tuple[dict[str, Any], ...] = (
    {"color": SECOND, "linestyle": "--", "marker": "o", "markerfacecolor": "none"},
    {"color": FIRST, "linestyle": "-", "marker": "o"},
)  # of a first and a second series, distinguishable without colour

ByGroup = Mapping[str, float]  # numbers by group name, such as `model.layers.0.qkv`


def require_matplotlib() -> None:
    """Raise MistralcError if matplotlib is missing; call it before measuring anything."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MistralcError(
            "The report's figures need matplotlib, which is not installed. Install it: pip install "
            "'mistralc[report]'."
        )


def pareto_figure(measured: Sequence[BundleRow], description: str) -> str:
    """Plot perplexity against the bytes read per token, with the Pareto front as a line."""
    with _figure("pareto", (9, 4.6)) as (figure, finish):
        axes = figure.add_subplot(xlabel="weights read per token (MB)", ylabel="perplexity")
        shown = [one for one in measured if np.isfinite(one.perplexity)]
        best = pareto_front(measured)
        reference = next((one.reference_perplexity for one in shown
                          if one.reference_perplexity is not None), None)  # fmt: skip
        if reference is not None:
            label = f"the checkpoint in float32: {reference:.2f}"
            axes.axhline(reference, color=INK, linestyle=":", linewidth=1, label=label)
        axes.plot(*_points(best), color=FIRST, marker="o", drawstyle="steps-post",
                  label="on the front")  # fmt: skip
        others = [one for one in shown if one not in best]
        if others:
            axes.plot(*_points(others), **LINES[0] | {"linestyle": ""}, label="not on the front")
        values = [one.perplexity for one in shown]
        if values and max(values) > MAX_LINEAR_RATIO * min(values):
            axes.set_yscale("log")
            _plain_ticks(axes)
        axes.margins(x=0.18, y=0.18)
        _label(figure, axes, shown)
        figure.legend(loc="outside upper center", ncols=3)
        return finish("Perplexity against bytes read per token", description)


def layer_figure(
    name: str, title: str, series: Mapping[str, ByGroup], quantity: str, description: str
) -> str:
    """Plot one or two series on a logarithmic axis by layer, one panel for each kind of group.

    Of two series, the first is the baseline.
    """
    with _figure(name, (9, 5)) as (figure, finish):
        panels = figure.subplots(2, 2, sharex=True, sharey=True)
        styles = LINES[2 - len(series) :]
        for axes, (kind, words) in zip(panels.flat, GROUP_KINDS.items(), strict=True):
            axes.set_title(f"{kind}: {words}", loc="left")
            for (label, values), style in zip(series.items(), styles, strict=True):
                found = values_of_kind(values, kind)
                axes.plot(list(found), list(found.values()), **style, markersize=3.5, label=label)
        panels[0, 0].set_yscale("log")
        panels[0, 0].xaxis.get_major_locator().set_params(integer=True)
        _plain_ticks(panels[0, 0])
        figure.supxlabel("layer", fontsize=10)
        figure.supylabel(quantity, fontsize=10)
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2)
        return finish(title, description)


def values_of_kind(values: ByGroup, kind: str) -> dict[int, float]:
    """Return the numbers of one kind of group, keyed by layer in ascending order."""
    parts = {name: name.split(".") for name in values}
    found = {int(p[2]): values[name] for name, p in parts.items() if p[3:] == [kind]}
    return dict(sorted(found.items()))


@contextmanager
def _figure(
    name: str, size: tuple[float, float]
) -> Iterator[tuple["Figure", Callable[[str, str], str]]]:
    """Yield a figure of `size` inches, and a function that returns its SVG given title and text.

    Neither uses pyplot nor changes or reads the user's matplotlib settings.
    """
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.context(["default", dict(STYLE)]):
        figure = Figure(size, layout="constrained")
        FigureCanvasAgg(figure)  # can measure the width of a label

        def finish(title: str, description: str) -> str:
            file = io.StringIO()
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(file, format="svg", metadata=nothing)
            return _embedded(file.getvalue(), name, title, description)

        yield figure, finish


def _embedded(svg: str, name: str, title: str, description: str) -> str:
    """Adapt matplotlib's SVG for the page: unique ids, the page's colours, title, description."""
    svg = svg[svg.index("<svg") :]
    dropped = r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>"  # the page has its own style
    svg = re.sub(dropped, "", svg, flags=re.DOTALL)
    used = set(re.findall(r'href="#([^"]+)"', svg)) | set(re.findall(r"url\(#([^)]+)\)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{name}-", svg)
    for drawn, meant in THEME.items():
        svg = svg.replace(drawn, meant)
    opening = re.compile(r"<svg[^>]*?viewBox=(\"[^\"]*\")[^>]*>")
    head = (
        rf'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        rf'viewBox=\1 role="img" aria-labelledby="{name}-title {name}-description">'
    )
    words = (
        f'<title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-description">{escape(description)}</desc>'
    )
    found = opening.search(svg)
    if found is None:
        raise ValueError("matplotlib wrote an SVG without a viewBox")
    return found.expand(head) + words + re.sub(r"\n\s*", "\n", svg[found.end() :]).strip()


def _points(measured: Sequence[BundleRow]) -> tuple[list[float], list[float]]:
    return [one.read_bytes / 1e6 for one in measured], [one.perplexity for one in measured]


def _plain_ticks(axes: "Axes") -> None:
    """Label a logarithmic axis with plain numbers, at 1, 2 and 5 of each power of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _label(figure: "Figure", axes: "Axes", measured: Sequence[BundleRow]) -> None:
    """Write each name beside its point, where it overlaps neither a point nor another name."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # computes the position of the axes
    places = axes.transData.transform(np.column_stack(_points(measured)))
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in places]
    for one, (x, y) in sorted(zip(measured, map(tuple, places), strict=True), key=_position):
        text = axes.text(0, 0, one.name, fontsize=9, transform=None, parse_math=False)
        size = text.get_window_extent()
        text.remove()
        boxes = [
            Bbox.from_bounds(left, y + up - size.height / 2, size.width, size.height)
            for up, left in product(LABEL_OFFSETS, (x + 7, x - 7 - size.width))
        ]
        free = (box for box in boxes if not any(box.overlaps(other) for other in taken))
        chosen = next((box for box in free if _inside(box, axes.bbox)), boxes[0])
        taken.append(chosen)
        middle = (chosen.y0 + chosen.y1) / 2
        axes.annotate(
            one.name, _data(one), xytext=(chosen.x0 - x, middle - y), fontsize=9,
            textcoords="offset pixels", verticalalignment="center", parse_math=False,
        )  # fmt: skip


def _data(one: BundleRow) -> tuple[float, float]:
    return one.read_bytes / 1e6, one.perplexity


def _position(labelled: tuple[BundleRow, tuple[float, float]]) -> tuple[float, float, str]:
    one, (x, y) = labelled
    return y, x, one.name


def _inside(box: Any, outer: Any) -> bool:
    return bool(
        box.x0 >= outer.x0 and box.x1 <= outer.x1 and box.y0 >= outer.y0 and box.y1 <= outer.y1
    )
