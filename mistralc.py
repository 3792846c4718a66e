"""The program `mistralc`: the commands of all packages. Knows no command by name.

Importing a package's commands is cheap: each command imports torch or a backend when it runs.
"""

from typing import Annotated

import typer

import calib.cli.commands
import exporter.cli.commands
import runtime.cli.commands
from runtime.cli.main import DEBUG, run

app = typer.Typer(
    name="mistralc",
    help="Compile Mistral-architecture checkpoints into bundles, and run them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
exporter.cli.commands.register(app)
calib.cli.commands.register(app)
runtime.cli.commands.register(app)

BUILD_TOOLS = ("gguf", "google", "onnx", "onnx_ir", "onnxscript", "safetensors", "sentencepiece",
               "torch")  # fmt: skip
ADVICE = "It needs the build tools; install them: pip install 'mistralc[export]'."


def _show_version(*, asked: bool) -> None:
    if asked:
        from runtime.system.release import mistralc_version

        typer.echo(f"mistralc {mistralc_version()}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=lambda value: _show_version(asked=value),
                     is_eager=True, help="Print the version and exit."),
    ] = False,
    debug: Annotated[bool, typer.Option(DEBUG, help="Show the traceback of an error.")] = False,
) -> None:  # fmt: skip
    """Compile Mistral-architecture checkpoints into bundles, and run them."""


def main() -> None:
    """Run the command line; `runtime.cli.main.run` gives the exit statuses."""
    run(app, missing=dict.fromkeys(BUILD_TOOLS, ADVICE))


if __name__ == "__main__":
    main()
