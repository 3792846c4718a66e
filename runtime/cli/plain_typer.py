"""The part of typer's interface that this package uses, on argparse. Knows no command.

A production host need not have typer: `run.pyz` uses this module instead if typer is not
installed. The same declarations then accept the same arguments; only the help looks plainer.
"""

import argparse
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

INTERRUPTED = 130  # 128 + SIGINT
WRONG_USAGE = 2

Function = Callable[..., None]


class Exit(Exception):  # noqa: N818  (typer's name)
    """Exit the program with a status."""

    def __init__(self, code: int = 0) -> None:
        super().__init__(code)
        self.exit_code = code


@dataclass(frozen=True, slots=True)
class Parameter:
    """A declared argument or option. Settings that concern only typer's help are ignored."""

    positional: bool
    names: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)


def Option(*names: str, **settings: Any) -> Parameter:  # noqa: N802  (typer's name)
    """Declare an option; without names it is named after the parameter."""
    return Parameter(False, names, settings)


def Argument(**settings: Any) -> Parameter:  # noqa: N802  (typer's name)
    """Declare a positional argument."""
    return Parameter(True, (), settings)


def echo(message: str, *, err: bool = False) -> None:
    """Print a line, to standard error if `err`."""
    print(message, file=sys.stderr if err else sys.stdout)


class Typer:
    """A program of several commands; call it with the arguments to run one."""

    def __init__(self, *, name: str, help: str = "", **_settings: Any) -> None:  # noqa: A002
        self.name, self.help = name, help
        self.commands: dict[str, Function] = {}

    def command(self, name: str | None = None, **_settings: Any) -> Callable[[Function], Function]:
        """Add a function as a command, under its own name if none is given."""

        def add(function: Function) -> Function:
            self.commands[name or function.__name__.replace("_", "-")] = function
            return function

        return add

    def __call__(self, arguments: Sequence[str]) -> None:
        """Run a command. Raises SystemExit for help, wrong usage or an exit status."""
        if not arguments or arguments[0] in ("-h", "--help"):
            self._show_help()
            raise SystemExit(0 if arguments else WRONG_USAGE)
        name, *rest = arguments
        if name not in self.commands:
            print(
                f"{self.name}: There is no command {name!r}; --help lists the commands.",
                file=sys.stderr,
            )
            raise SystemExit(WRONG_USAGE)
        values = vars(
            parser(f"{self.name} {name}", self.commands[name]).parse_intermixed_args(rest)
        )
        try:
            self.commands[name](**values)
        except Exit as ended:
            raise SystemExit(ended.exit_code) from ended
        except KeyboardInterrupt as stopped:
            raise SystemExit(INTERRUPTED) from stopped

    def _show_help(self) -> None:
        width = max(map(len, self.commands))
        print(f"usage: {self.name} COMMAND ...\n\n{self.help}\n\ncommands:")
        for name, function in self.commands.items():
            print(f"  {name:<{width}}  {inspect.getdoc(function)}")


def parser(program: str, function: Function) -> argparse.ArgumentParser:
    """Make the parser of one command from the annotations of its parameters."""
    made = argparse.ArgumentParser(
        prog=program, description=inspect.getdoc(function), allow_abbrev=False
    )
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        _add(made, name, parameter.annotation, parameter.default)
    return made


def _add(made: argparse.ArgumentParser, name: str, annotation: Any, default: Any) -> None:
    kind, declared = get_args(annotation)[:2] if get_origin(annotation) is Annotated else (
        annotation, Option()
    )  # fmt: skip
    kind, required = _plain(kind), default is inspect.Parameter.empty
    known = declared.settings
    settings: dict[str, Any] = {"help": (known.get("help") or "").replace("%", "%%")}
    if not required:
        settings["default"] = default
    if kind is bool:
        names = declared.names or (f"--{_dashed(name)}",)
        settings["action"] = "store_true" if declared.names else argparse.BooleanOptionalAction
        made.add_argument(*names, dest=name, **settings)
        return
    settings["metavar"] = known.get("metavar") or name.upper()
    if get_origin(kind) is list:
        kind = get_args(kind)[0]
        settings["action"] = "append"
    settings["type"] = _bounded(kind, known.get("min"), known.get("max"))
    if declared.positional:
        made.add_argument(name, nargs=None if required else "?", **settings)
    else:
        names = declared.names or (f"--{_dashed(name)}",)
        made.add_argument(*names, dest=name, required=required, **settings)


def _plain(kind: Any) -> Any:
    """Return the type without the `| None` of an option that may be left out."""
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (each for each in get_args(kind) if each is not NoneType)
    return kind


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _bounded(
    kind: Callable[[str], Any], least: float | None, most: float | None
) -> Callable[[str], Any]:
    """Return a function that reads a value of `kind`, or raises ArgumentTypeError."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError as error:
            named = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {named}") from error
        if least is not None and value < least:
            raise argparse.ArgumentTypeError(f"{text} is below {least}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"{text} is above {most}")
        return value

    return read
