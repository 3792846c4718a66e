"""The command doctor: its options and table. `runtime.doctor` does the checking."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from runtime.cli import options
from runtime.system.progress import stage_for


def doctor(
    *,
    bundle: Annotated[
        Path | None, typer.Argument(metavar="[BUNDLE]", help="Check this bundle as well.")
    ] = None,
    require_signature: options.RequireSignature = None,
    as_json: options.Json = False,
) -> None:
    """Check whether this host can run mistralc, and a bundle; exit with 1 if a check fails."""
    from runtime.doctor.host_checks import examine

    with stage_for(quiet=as_json)("Checking", None):
        checks = examine(bundle, require_signature)
    bad = any(check.state == "failed" for check in checks)
    if as_json:
        print(json.dumps({"ok": not bad, "checks": [asdict(check) for check in checks]}))
    else:
        _show([(c.state, c.name, c.found, c.remedy) for c in checks])
    if bad:
        raise typer.Exit(1)


def _show(rows: list[tuple[str, str, str, str | None]]) -> None:
    """Print a line per check, its remedy below it. Long lines are not broken: they are copied."""
    colours = {"ok": "32", "warning": "33", "failed": "1;31"}  # green, yellow, bold red
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    width = max(len(name) for _, name, _, _ in rows)
    for state, name, found, remedy in rows:
        word = f"{state:<9}"
        if coloured:
            word = f"\x1b[{colours[state]}m{word}\x1b[0m"
        print(f"{word}{name:<{width}}  {found}")
        if remedy is not None:
            print(f"{'':<9}{'':<{width}}  → {remedy}")
