"""How a command line ends: errors in one paragraph, exit statuses. Knows no command."""

import sys
from collections.abc import Callable, Mapping

import typer

from graphs.errors import MistralcError

DEBUG = "--debug"
INTERRUPTED = 130  # what typer makes of a KeyboardInterrupt: 128 + SIGINT


def run(
    app: Callable[[list[str]], object], *, missing: Mapping[str, str], name: str = "mistralc"
) -> None:
    """Run `app` on this process's arguments.

    Exit status: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C. `missing` says, by package,
    what to do where it is not installed; any other that is not is a fault, and gets a traceback.
    """
    arguments = sys.argv[1:]
    debug = DEBUG in arguments
    try:
        app([argument for argument in arguments if argument != DEBUG])
    except MistralcError as error:
        if debug:
            raise
        typer.echo(f"{name}: {error}", err=True)
        raise SystemExit(error.exit_code) from error
    except ModuleNotFoundError as error:
        remedy = missing.get(str(error.name).partition(".")[0])
        if debug or remedy is None:
            raise
        typer.echo(
            f"{name}: This command needs the package {error.name}, which is not installed here. "
            f"{remedy}",
            err=True,
        )
        raise SystemExit(1) from error
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            typer.echo(f"{name}: stopped.", err=True)
        raise
