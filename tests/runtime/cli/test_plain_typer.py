"""`plain_typer` accepts the same arguments as typer, for every command of the runtime."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

import runtime.cli.commands

ROOT = Path(__file__).resolve().parents[3]

LINES = [
    "generate . prompt",
    "generate . --chat prompt",
    "generate --chat . prompt -n 3 --no-stream",
    "generate .",
    "generate . - -t 0.5 --top-k=4 --stop a --stop b",
    "generate . --file some/prompt.txt --temperature -1",
    "generate . -q --logit-bias 2=-100 --logit-bias 3=1 --seed 7 -- -prompt",
    "chat . --system be --require-signature key.pub --speculate 4",
    "bench . --prompt-tokens 4 --new-tokens 2 --plot a.png --json",
    "inspect bundle --json",
    "doctor",
    "doctor bundle",
    "diff a b --static --exit-code",
    "keygen -o key",
    "sign bundle --key key",
    "chat . -n 3 --stop a --stop b --threads 2 --no-check",
    "serve .",
    "serve . --rows 2 --port 0 --timeout-seconds 5 --read-seconds 0.5 --model-name m --json",
    "serve . --max-prompt-tokens 9 --drain-seconds 0 --threads 2 --no-check",
]

PLAIN_TYPER = """
import json, sys
from runtime.cli import plain_typer
sys.modules["typer"] = plain_typer
import runtime.cli.commands
app = plain_typer.Typer(name="run.pyz")
runtime.cli.commands.register(app)
options, values = {}, []
for name, function in app.commands.items():
    made = plain_typer.parser(name, function)
    options[name] = sorted(set(made._option_string_actions) - {"-h", "--help"})
for name, *rest in json.load(sys.stdin):
    made = plain_typer.parser(name, app.commands[name])
    values.append(vars(made.parse_intermixed_args(rest)))
json.dump([options, values], sys.stdout, default=str)
"""


@cache
def plain_typer() -> tuple[dict[str, list[str]], list[dict[str, Any]]]:
    """Option strings by command, and the parsed values of each of LINES, by `plain_typer`."""
    done = subprocess.run([sys.executable, "-c", PLAIN_TYPER], cwd=ROOT, text=True, check=True,
                          input=json.dumps([line.split() for line in LINES]),
                          stdout=subprocess.PIPE)  # fmt: skip
    options, values = json.loads(done.stdout)
    return options, values


@cache
def commands() -> dict[str, Any]:
    """The same commands, made by typer."""
    app = typer.Typer()
    runtime.cli.commands.register(app)
    found: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return found


def test_every_command_has_the_same_options() -> None:
    options, _ = plain_typer()
    assert options.keys() == commands().keys()
    for name, command in commands().items():
        declared = [one for one in command.params if one.param_type_name == "option"]
        strings = {string for one in declared for string in (*one.opts, *one.secondary_opts)}
        assert set(options[name]) == strings - {"--help"}, name


@pytest.mark.parametrize("line", LINES)
def test_a_command_line_parses_to_the_same_values(line: str) -> None:
    name, *rest = line.split()
    params = commands()[name].make_context(name, rest).params
    expected = json.loads(json.dumps(params, default=str))
    # typer turns the [] of a repeatable option that was not given into None.
    expected = {key: None if value == [] else value for key, value in expected.items()}
    assert plain_typer()[1][LINES.index(line)] == expected
