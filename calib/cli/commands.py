"""The commands of calib. Knows their names, and nothing about what they do."""

import typer

from calib.cli.calibrate import calibrate
from calib.cli.evaluate import evaluate
from calib.cli.report import report
from runtime.cli.option_fields import with_option_fields


def register(app: typer.Typer) -> None:
    """Add this package's commands to `app`."""
    app.command()(with_option_fields(calibrate))
    app.command("eval")(with_option_fields(evaluate))
    app.command()(with_option_fields(report))
