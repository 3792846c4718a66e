"""The command `mistralc`: one program, the commands of each package. Knows none of them itself.

Importing a package's `cli` costs nothing heavy: torch and the backends are imported by the
command that needs them, when it runs.
"""

import sys
from typing import Annotated

import typer

import calib.cli
import exporter.cli
import runtime.cli
from graphs.errors import MistralcError

app = typer.Typer(
    name="mistralc",
    help="Compile Mistral-architecture checkpoints into one directory, and run it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
exporter.cli.register(app)
calib.cli.register(app)
runtime.cli.register(app)

DEBUG = "--debug"
INTERRUPTED = 130  # what typer makes of a KeyboardInterrupt: 128 + SIGINT
BUILD_TOOLS = {"gguf", "google", "onnx", "onnx_ir", "onnxscript", "safetensors", "sentencepiece",
               "torch"}  # fmt: skip


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
    """Run the command line. Exit status: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C."""
    arguments = sys.argv[1:]
    debug = DEBUG in arguments
    try:
        app([argument for argument in arguments if argument != DEBUG])
    except MistralcError as error:
        if debug:
            raise
        typer.echo(f"mistralc: {error}", err=True)
        raise SystemExit(error.exit_code) from error
    except ModuleNotFoundError as error:
        if debug or str(error.name).partition(".")[0] not in BUILD_TOOLS:
            raise
        typer.echo(
            f"mistralc: This command makes or checks bundles and needs the package {error.name}, "
            "which is not installed here. Install the build tools: pip install 'mistralc[export]'.",
            err=True,
        )
        raise SystemExit(1) from error
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            typer.echo("mistralc: stopped.", err=True)
        raise


if __name__ == "__main__":
    main()
