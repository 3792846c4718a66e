"""The command `mistralc`: one program, the commands of each package. Knows none of them itself.

Importing a package's `cli` costs nothing heavy: torch and the backends are imported by the
command that needs them, when it runs.
"""

from typing import Annotated

import typer

import calib.cli.evaluate
import exporter.cli.export
import runtime.cli.commands
from runtime.cli.main import DEBUG, run

app = typer.Typer(
    name="mistralc",
    help="Compile Mistral-architecture checkpoints into one directory, and run it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
exporter.cli.export.register(app)
calib.cli.evaluate.register(app)
runtime.cli.commands.register(app)

BUILD_TOOLS = ("gguf", "google", "onnx", "onnx_ir", "onnxscript", "safetensors", "sentencepiece",
               "torch")  # fmt: skip
ADVICE = "It makes or checks bundles; install the build tools: pip install 'mistralc[export]'."


def _version(*, asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"mistralc {version('mistralc')}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    show_version: Annotated[
        bool, typer.Option("--version", callback=lambda value: _version(asked=value), is_eager=True,
                           help="Print the version and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option(DEBUG, help="Show tracebacks of errors.")] = False,
) -> None:  # fmt: skip
    """Compile Mistral-architecture checkpoints into one directory, and run it."""


def main() -> None:
    """Run the command line; `runtime.cli.main.run` says how it ends."""
    run(app, missing=dict.fromkeys(BUILD_TOOLS, ADVICE))


if __name__ == "__main__":
    main()
