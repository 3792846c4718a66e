"""The command `run.pyz`: what a bundle can do on a host without mistralc. Knows no archive.

The commands are those of `runtime.cli.commands`. Measuring with `eval` and comparing with
`verify` are not among them: they are for the host that builds, and `calib` and `exporter` are
not in the archive.
"""

import sys

import typer

from runtime.cli.main import run

NAME = "run.pyz"

REQUIRED = ("numpy", "tokenizers", "jinja2")  # whatever the bundle's backend
ADVICE = f"Every bundle needs it: pip install {' '.join(REQUIRED)}, and the bundle's backend."


def main(version: str) -> None:
    """Run the command line; `version` is that of the mistralc that wrote the archive."""
    if sys.argv[1:2] == ["--version"]:
        print(f"{NAME} of mistralc {version}")
        return
    run(_run, missing=dict.fromkeys(REQUIRED, ADVICE), name=NAME)


def _run(arguments: list[str]) -> None:
    import runtime.cli.commands  # needs numpy, whose absence `run` explains

    app = typer.Typer(
        name=NAME,
        help=f"Run the bundle that this file lies in: python {NAME} generate . PROMPT",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    runtime.cli.commands.register(app)
    app(arguments)
