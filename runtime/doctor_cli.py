"""The command doctor: its arguments and its table. Knows no check."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from runtime import options
from runtime.progress import stage_for


def doctor(
    *,
    bundle: Annotated[
        Path | None, typer.Argument(metavar="[BUNDLE]", help="Check this bundle as well.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Say whether this host can run mistralc, and a bundle; exit 1 when something fails."""
    from runtime.doctor import examine

    with stage_for(quiet=as_json)("Checking", None):
        checks = examine(bundle)
    bad = any(check.state == "failed" for check in checks)
    if as_json:
        print(json.dumps({"ok": not bad, "checks": [asdict(check) for check in checks]}))
    else:
        _show([(c.state, c.name, c.found, c.remedy) for c in checks])
    if bad:
        raise typer.Exit(1)


def _show(rows: list[tuple[str, str, str, str | None]]) -> None:
    """Print one line a check, and under it what to do; lines are not broken, to be copied whole."""
    from rich.console import Console
    from rich.text import Text

    colours = {"ok": "green", "warning": "yellow", "failed": "bold red"}
    console = Console(highlight=False, soft_wrap=True)
    width = max(len(name) for _, name, _, _ in rows)
    for state, name, found, remedy in rows:
        console.print(Text.assemble((f"{state:<9}", colours[state]), f"{name:<{width}}  {found}"))
        if remedy is not None:
            console.print(Text(f"{'':<9}{'':<{width}}  → {remedy}"))
