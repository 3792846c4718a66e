"""The commands of a production host. Knows their names, and nothing about what they do."""

import typer

from runtime.cli.bench import bench
from runtime.cli.chat import chat
from runtime.cli.diff import diff
from runtime.cli.doctor import doctor
from runtime.cli.generate import generate
from runtime.cli.inspect import inspect
from runtime.cli.option_fields import with_option_fields
from runtime.cli.serve import serve
from runtime.cli.sign import keygen, sign

COMMANDS = (generate, chat, inspect, bench, doctor, diff, keygen, sign, serve)
"""In the order in which `--help` lists them."""


def register(app: typer.Typer) -> None:
    """Add this package's commands to `app`."""
    for command in COMMANDS:
        app.command()(with_option_fields(command))
