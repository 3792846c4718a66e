"""Limit what one expression of a template can produce, in Jinja's sandbox.

Jinja's sandbox denies a template files, Python's internals and changes to its values. It does not
stop `'a' * 10**10` or `10 ** 10 ** 10` from taking all memory or time, and Jinja evaluates
constants while it compiles. So operators, arguments, field widths and the length of the whole text
are limited here. The number of steps is not limited: nested loops may run for any time, and text
that `~` doubles or `replace` multiplies may grow until it is written.
"""

import re
from collections.abc import Callable, Iterable, Sized
from functools import wraps
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_LENGTH = 4_000_000  # characters or items, about a million tokens
_MAX_EXPONENT = 64
_WIDTH = re.compile(r"\d{6,}|\*")  # a width of 100,000 or more, or given as an argument


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment for chat templates. Raises SecurityError if a limit is exceeded."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        del self.globals["lipsum"]  # writes any amount of text, and no chat needs it
        self.filters = {name: limit_arguments(f) for name, f in self.filters.items()}

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute an operator after checking that its result is not too large."""
        if operator == "**" and not (_is_small(left) and _is_small(right, _MAX_EXPONENT)):
            raise _too_large("a power")
        if operator == "*" and _size(left) * _size(right) > MAX_LENGTH**2:
            raise _too_large("a product")
        if operator == "*" and (isinstance(left, Sized) or isinstance(right, Sized)):
            times = left if isinstance(right, Sized) else right
            if _size(left) * _size(right) > MAX_LENGTH or not isinstance(times, int):
                raise _too_large("a repetition")
        if operator == "%" and isinstance(left, str) and _WIDTH.search(left):
            raise _too_large("a field of text")
        limit = MAX_LENGTH if isinstance(left, Sized) else MAX_LENGTH**2
        if operator == "+" and _size(left) + _size(right) > limit:
            raise _too_large("a sum")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, /, *args: Any, **options: Any) -> Any:
        """Call a function or method after checking that no argument is too large."""
        _check(args, options)
        return super().call(context, function, *args, **options)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return `str.format` after checking that no field width is too large."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None and _WIDTH.search(value.__self__):
            raise _too_large("a field of text")
        return wrapped


def limit_output(parts: Iterable[str]) -> Iterable[str]:
    """Yield a template's output. Raises SecurityError if it exceeds `MAX_LENGTH`."""
    total = 0
    for part in parts:
        total += len(part)
        if total > MAX_LENGTH:
            raise _too_large("the text")
        yield part


def limit_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter so that it refuses too large arguments before it computes anything."""

    @wraps(function)  # keeps the attributes by which Jinja marks filters
    def call(*args: Any, **options: Any) -> Any:
        _check(args, options)
        if function.__name__ == "do_format" and args and _WIDTH.search(str(args[0])):
            raise _too_large("a field of text")
        return function(*args, **options)

    return call


def _check(args: tuple[Any, ...], options: dict[str, Any]) -> None:
    if not all(_is_small(value) for value in (*args, *options.values()) if type(value) is int):
        raise _too_large("an argument")


def _is_small(value: Any, limit: int = MAX_LENGTH) -> bool:
    return isinstance(value, int | float) and -limit <= value <= limit


def _size(value: Any) -> int | float:
    """Length of a sequence or magnitude of a number; 1 for anything else."""
    if isinstance(value, Sized):
        return len(value)
    return abs(value) if isinstance(value, int | float) else 1


def _too_large(what: str) -> SecurityError:
    return SecurityError(f"{what} would exceed the limit for a chat ({MAX_LENGTH:,})")
