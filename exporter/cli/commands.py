"""The commands of a build host. Knows their names, and nothing about what they do."""

import typer

from exporter.cli.export import export
from exporter.cli.plan import plan
from exporter.cli.triton import triton
from exporter.cli.verify import verify
from runtime.cli.option_fields import with_option_fields

COMMANDS = (export, verify, plan, triton)
"""In the order in which `--help` lists them."""


def register(app: typer.Typer) -> None:
    """Add this package's commands to `app`."""
    for command in COMMANDS:
        app.command()(with_option_fields(command))
