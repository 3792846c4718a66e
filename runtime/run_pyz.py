"""The program `run.pyz`: the commands of `runtime.cli.commands`, on a host without mistralc.

`eval` and `verify` are not among them, because `calib` and `exporter` are not in the archive.
"""

import sys

import typer

from runtime.cli.main import run
from runtime.system.host import REQUIRED

NAME = "run.pyz"

ADVICE = f"Every bundle needs it: pip install {' '.join(REQUIRED)}, and the bundle's backend."


def main(version: str) -> None:
    """Run the command line; `version` is the version of mistralc that wrote the archive."""
    if sys.argv[1:2] == ["--version"]:
        print(f"{NAME} of mistralc {version}")
        return
    run(_run, missing=dict.fromkeys(REQUIRED, ADVICE), name=NAME)


def _run(arguments: list[str]) -> None:
    import runtime.cli.commands  # needs numpy, whose absence `run` explains

    app = typer.Typer(
        name=NAME,
        help=f"Run the bundle that contains this file: python {NAME} generate . PROMPT",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    runtime.cli.commands.register(app)
    app(arguments)
