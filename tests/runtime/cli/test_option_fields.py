"""Dataclass fields become command-line options, with typer and with its stand-in alike."""

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import pytest
import typer

from graphs.errors import UsageError
from runtime.cli import options, plain_typer
from runtime.cli.main import run
from runtime.cli.option_fields import build, with_option_fields
from runtime.serve.settings import Limits
from tests.conftest import Command
from tests.support.commands import usage_error

FRAMEWORKS = pytest.mark.parametrize("framework", [typer, plain_typer], ids=["typer", "argparse"])


def declared(framework: ModuleType) -> tuple[type[Any], type[Any]]:
    """Two dataclasses of options, the second nested in the first."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Inner:
        names: Annotated[tuple[str, ...], framework.Option("--name", "-n")] = ()
        sizes: Annotated[tuple[int, ...], framework.Option(min=1)] = ()
        path: Annotated[Path | None, framework.Option()] = None

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Outer:
        count: Annotated[int, framework.Option(min=1, help="How many.")]
        rate: Annotated[float, framework.Option("--rate-per-second")] = 0.5
        fast: Annotated[bool, framework.Option("--fast")] = False
        stream: Annotated[bool, framework.Option()] = True
        inner: Inner = field(default_factory=Inner)
        buffered: int = 7

        def __post_init__(self) -> None:
            if self.count == 13:
                raise UsageError("--count is 13; expected another number. Choose 12 or 14.")

    return Outer, Inner


def application(framework: ModuleType, command: Callable[..., None]) -> Any:
    """A program of two commands: typer gives a program of one command no name for it."""
    app = framework.Typer(name="test")
    app.command("run")(with_option_fields(command))
    app.command("other")(lambda: None)
    return app


def received(framework: ModuleType, *arguments: str) -> tuple[str, Any]:
    """What a command with an argument and a group of options gets from a command line."""
    outer, _ = declared(framework)
    got: list[tuple[str, Any]] = []

    def command(*, text: Annotated[str, framework.Argument()], group: outer) -> None:  # type: ignore[valid-type]
        got.append((text, group))

    with suppress(SystemExit):
        application(framework, command)(["run", *arguments])
    (result,) = got
    return result


@FRAMEWORKS
def test_fields_are_options_and_defaults_are_kept(framework: ModuleType) -> None:
    text, group = received(framework, "hello", "--count", "3")
    assert text == "hello"
    assert (group.count, group.rate, group.fast, group.stream) == (3, 0.5, False, True)
    assert (group.inner.names, group.inner.sizes, group.inner.path) == ((), (), None)
    assert group.buffered == 7


@FRAMEWORKS
def test_every_kind_of_option_reaches_its_field(framework: ModuleType) -> None:
    line = "--count 3 --rate-per-second 2 --fast --no-stream -n a --name b --sizes 4 --path p"
    _, group = received(framework, *line.split(), "hello")
    assert (group.count, group.rate, group.fast, group.stream) == (3, 2.0, True, False)
    assert (group.inner.names, group.inner.sizes) == (("a", "b"), (4,))
    assert group.inner.path == Path("p")


@FRAMEWORKS
@pytest.mark.parametrize(
    "arguments",
    [(), ("--count", "0"), ("--count", "many"), ("--count", "3", "--sizes", "0"),
     ("--count", "3", "--buffered", "9"), ("--count", "3", "--inner", "x")],
    ids=" ".join,
)  # fmt: skip
def test_the_command_line_checks_what_fields_declare(
    framework: ModuleType, arguments: tuple[str, ...]
) -> None:
    outer, _ = declared(framework)

    def command(*, group: outer) -> None:  # type: ignore[valid-type]
        pytest.fail(f"the command ran with {group}")

    with pytest.raises(SystemExit) as ended:
        application(framework, command)(["run", *arguments])
    assert ended.value.code == 2


@FRAMEWORKS
def test_an_error_of_the_dataclass_reaches_the_user_as_wrong_usage(
    framework: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outer, _ = declared(framework)

    def command(*, group: outer) -> None:  # type: ignore[valid-type]
        pytest.fail(f"the command ran with {group}")

    monkeypatch.setattr(sys, "argv", ["test", "run", "--count", "13"])
    with pytest.raises(SystemExit) as ended:
        run(application(framework, command), missing={}, name="test")
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "test: --count is 13; expected another number. Choose 12 or 14.\n"
    )


def test_two_options_of_one_name_are_refused_when_the_command_is_declared() -> None:
    outer, inner = declared(typer)

    def own(*, count: int, group: outer) -> None: ...  # type: ignore[valid-type]

    def nested(*, first: inner, group: outer) -> None: ...  # type: ignore[valid-type]

    with pytest.raises(TypeError, match="own: two options are named count"):
        with_option_fields(own)
    with pytest.raises(TypeError, match="nested: two options are named names"):
        with_option_fields(nested)


def test_a_tuple_that_would_lose_its_default_is_refused_when_the_command_is_declared() -> None:
    @dataclass(frozen=True)
    class Sizes:
        sizes: Annotated[tuple[int, ...], typer.Option()] = (1, 2)

    def command(*, group: Sizes) -> None: ...

    with pytest.raises(TypeError, match=r"Sizes.sizes: the default of a tuple must be \(\)"):
        with_option_fields(command)


def test_an_option_may_have_the_name_of_a_parameter_that_holds_a_group() -> None:
    outer, _ = declared(typer)
    got = []

    def command(*, count: outer) -> None:  # type: ignore[valid-type]
        got.append(count)

    wrapped: Any = with_option_fields(command)
    given = {"rate": 1.0, "fast": False, "stream": True, "names": None, "sizes": None, "path": None}
    wrapped(count=3, **given)
    assert got[0].count == 3


def test_a_command_without_groups_stays_as_it_is() -> None:
    def command(*, text: str, times: int = 2) -> None:
        """Say it."""
        got.append(text * times)

    got: list[str] = []
    wrapped = with_option_fields(command)
    wrapped(text="a", times=3)
    assert got == ["aaa"]
    assert (wrapped.__name__, wrapped.__doc__) == ("command", "Say it.")


def test_a_list_or_nothing_becomes_a_tuple() -> None:
    _, inner = declared(typer)
    assert build(inner, {"names": None, "sizes": [1, 2], "path": None}).names == ()
    assert build(inner, {"names": None, "sizes": [1, 2], "path": None}).sizes == (1, 2)


# The groups of the runtime's commands


def test_sampling_options_give_only_what_the_user_set() -> None:
    assert options.SamplingOptions().given == {}
    assert options.SamplingOptions(temperature=0, top_k=5).given == {"temperature": 0, "top_k": 5}
    reported = options.GenerateSamplingOptions(seed=1, logit_bias=("2=-100", "3=0.5"))
    assert reported.given == {"seed": 1, "logit_bias": {2: -100.0, 3: 0.5}}


@pytest.mark.parametrize(
    ("values", "message"),
    [({"temperature": -1.0}, "temperature is -1.0"), ({"top_p": 2.0}, "top_p is 2.0"),
     ({"logit_bias": ("x",)}, "--logit-bias is 'x'"), ({"logprobs": -1}, "logprobs is -1")],
)  # fmt: skip
def test_a_sampling_option_out_of_range_is_refused_when_it_is_made(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        options.GenerateSamplingOptions(**values)


def test_only_generate_has_the_options_that_concern_single_tokens(
    mistralc: Command, tmp_path: Path
) -> None:
    for option in ("--logprobs", "--logit-bias"):
        usage_error(mistralc("chat", tmp_path, option, "1"), f"No such option: {option}")


def test_every_limit_of_the_server_but_the_buffer_is_an_option() -> None:
    def command(*, limits: Limits) -> None: ...

    names = {one.name for one in fields(Limits)}
    assert set(with_option_fields(command).__annotations__) == names - {"buffered_tokens"}
