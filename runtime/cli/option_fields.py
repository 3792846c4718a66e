"""Turn dataclass fields into command-line options, so that each option is declared once.

A field's name, type and default are those of the option; its `typer.Option` is in the annotation:

    @dataclass(frozen=True, kw_only=True)
    class Limits:
        max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens.")] = 512
        buffered_tokens: int = 1024

    @with_option_fields
    def generate(*, prompt: str, limits: Limits) -> None: ...

`generate` then has the options `--prompt` and `--max-tokens`. A field without `typer.Option`, such
as `buffered_tokens`, keeps its default. Fields that are dataclasses are expanded too. Works with
typer and with `plain_typer` alike: both read a command's signature.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import wraps
from typing import Annotated, Any, get_args, get_origin, get_type_hints

Command = Callable[..., None]


def with_option_fields(command: Command) -> Command:
    """Replace each parameter of `command` that is a dataclass by the options among its fields.

    Raises TypeError if two options would have one name, or if a tuple has a default other than ().
    """
    hints = get_type_hints(command, include_extras=True)
    groups = {name: kind for name, kind in hints.items() if _is_group(kind)}
    parameters: dict[str, inspect.Parameter] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        added = list(_options(groups[name])) if name in groups else [
            parameter.replace(annotation=hints[name])
        ]  # fmt: skip
        for option in added:
            if option.name in parameters:
                raise TypeError(f"{command.__name__}: two options are named {option.name}")
            parameters[option.name] = option

    @wraps(command)
    def run(**given: Any) -> None:
        made = {name: build(kind, given) for name, kind in groups.items()}
        rest = {n: value for n, value in given.items() if n in hints and n not in groups}
        command(**rest, **made)

    run.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    run.__annotations__ = {name: each.annotation for name, each in parameters.items()}
    del run.__wrapped__  # typer would read the hints of the original
    return run


def build(kind: type[Any], given: Mapping[str, Any]) -> Any:
    """Make a dataclass of the values given for its options and those of nested dataclasses."""
    values = {}
    for field, hint in _option_fields(kind):
        if _is_group(hint):
            values[field.name] = build(hint, given)
        elif _holds_many(_plain(hint)):
            values[field.name] = tuple(given[field.name] or ())
        else:
            values[field.name] = given[field.name]
    return kind(**values)


def _options(kind: type[Any]) -> Iterator[inspect.Parameter]:
    for field, hint in _option_fields(kind):
        if _is_group(hint):
            yield from _options(hint)
            continue
        annotation, default = hint, field.default
        if _holds_many(_plain(hint)):  # a command line gives a list, or nothing
            if default != ():
                raise TypeError(f"{kind.__name__}.{field.name}: the default of a tuple must be ()")
            (item, _), (_, *extra) = get_args(_plain(hint)), get_args(hint)
            annotation = Annotated[(list[item] | None, *extra)]  # type: ignore[valid-type]
            default = None
        yield inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if default is MISSING else default,
            annotation=annotation,
        )


def _is_group(hint: Any) -> bool:
    return isinstance(hint, type) and is_dataclass(hint)


def _option_fields(kind: type[Any]) -> Iterator[tuple[Field[Any], Any]]:
    """The fields that are options or groups of options, with their types."""
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        hint = hints[field.name]
        if get_origin(hint) is Annotated or _is_group(hint):
            yield field, hint


def _plain(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _holds_many(hint: Any) -> bool:
    """Whether a field is of type `tuple[X, ...]`, whose option may be given several times."""
    return get_origin(hint) is tuple
