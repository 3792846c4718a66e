"""Run a command line: errors in one paragraph, exit statuses. Knows no command."""

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import typer

from graphs.errors import MistralcError

DEBUG = "--debug"
INTERRUPTED = 130  # 128 + SIGINT, which typer exits with on a KeyboardInterrupt


def run(
    app: Callable[[list[str]], object], *, missing: Mapping[str, str], name: str = "mistralc"
) -> None:
    """Run `app` with this process's arguments.

    Exit status: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C. `missing` maps packages
    that may be absent to a remedy; if any other package is absent, that is a defect and the
    traceback is shown.
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


def program_name() -> str:
    """Return what to type to run this program again, for commands that we suggest to the user."""
    called = Path(sys.argv[0])
    if shutil.which(called.name) == str(called.absolute()):
        return called.name
    return os.path.relpath(called)
