"""Write the report's sections as one self-contained HTML page.

The page fetches no script, font, style or image. Figures are inline SVG in colours that the page
defines for light and dark mode. For screen readers, figures have titles and descriptions, and
tables have captions and headers.
"""

from collections.abc import Iterator, Sequence
from html import escape

from calib.report.sections import TITLE, Grid, Section

STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1c2024; --quiet: #5b6470;
  --faint: #d9dde2; --stripe: #f5f6f8; --first: #0b62a8; --second: #b4510f; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14171a; --ink: #e4e7ea; --quiet: #a0a8b2; --faint: #353b42;
    --stripe: #1c2025; --first: #6db3f2; --second: #f0a068; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 60rem; background: var(--ground);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
p { max-width: 44rem; margin: 0 0 1rem; }
figure { margin: 0 0 1rem; }
svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: system-ui, sans-serif !important; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
caption { text-align: left; color: var(--quiet); padding: .25rem 0; }
th, td { padding: .25rem .5rem; text-align: right; border-bottom: 1px solid var(--faint);
  white-space: nowrap; }
thead th { vertical-align: bottom; white-space: normal; }
th:first-child, .words th, .words td { text-align: left; }
.words td { white-space: normal; overflow-wrap: anywhere; }
tbody th { font-weight: 500; }
tbody tr:nth-child(even) { background: var(--stripe); }
summary { cursor: pointer; color: var(--first); padding: .25rem 0; }
"""


def to_html(parts: Sequence[Section]) -> str:
    """Return the sections as an HTML page."""
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(TITLE)}</title>",
        f"<style>{STYLE}</style>",
        "</head>",
        "<body>",
        "<main>",
        f"<h1>{escape(TITLE)}</h1>",
        *(line for part in parts for line in _section(part)),
        "</main>",
        "</body>",
        "</html>",
        "",
    ]
    return "\n".join(lines)


def _section(part: Section) -> Iterator[str]:
    yield "<section>"
    yield f"<h2>{escape(part.heading)}</h2>"
    yield f"<p>{escape(part.text)}</p>"
    if part.figure:
        yield f"<figure>{part.figure}</figure>"
    if part.grid is not None:
        yield from _folded(part.grid) if part.grid.folded else _table(part.grid)
    yield "</section>"


def _folded(grid: Grid) -> Iterator[str]:
    yield "<details>"
    yield f"<summary>All numbers: {escape(grid.caption)}</summary>"
    yield from _table(grid)
    yield "</details>"


def _table(grid: Grid) -> Iterator[str]:
    # A named region with a tabindex can be scrolled sideways with the keyboard.
    yield f'<div class="wide" role="region" tabindex="0" aria-label="{escape(grid.caption)}">'
    yield '<table class="words">' if grid.words else "<table>"
    yield f"<caption>{escape(grid.caption)}</caption>"
    heads = "".join(f'<th scope="col">{escape(word)}</th>' for word in grid.header)
    yield f"<thead><tr>{heads}</tr></thead>"
    yield "<tbody>"
    for first, *rest in grid.rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        yield f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>'
    yield "</tbody></table></div>"
