"""Jinja's sandbox, with a bound on what one expression may make. Knows nothing about chats.

The sandbox keeps a template from files, from Python's internals and from changing its values. It
does not keep `'a' * 10**10` or `10 ** 10 ** 10` from taking all memory or all time, and Jinja
computes constants while it compiles. So operators, arguments and field widths are bounded here, and
the text as a whole. What is not bounded is the number of steps: loops inside loops may run as long
as they like, and text that `~` doubles or `replace` multiplies may grow until it is written.
"""

import re
from collections.abc import Callable, Iterable, Sized
from functools import wraps
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

LONGEST = 4_000_000  # characters or items: a chat of about a million tokens
_LARGEST_EXPONENT = 64
_WIDTH = re.compile(r"\d{6,}|\*")  # a field of a hundred thousand characters or more, or of any


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment that chat templates are compiled in. Raises SecurityError beyond bounds."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        del self.globals["lipsum"]  # made-up Latin in any amount: nothing for a chat
        self.filters = {name: bounded_call(one) for name, one in self.filters.items()}

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute an operator once its result is known to be of a size that text can have."""
        if operator == "**" and not (_is_small(left) and _is_small(right, _LARGEST_EXPONENT)):
            raise _beyond("a power")
        if operator == "*" and _size(left) * _size(right) > LONGEST**2:
            raise _beyond("a product")
        if operator == "*" and (isinstance(left, Sized) or isinstance(right, Sized)):
            times = left if isinstance(right, Sized) else right
            if _size(left) * _size(right) > LONGEST or not isinstance(times, int):
                raise _beyond("a repetition")
        if operator == "%" and isinstance(left, str) and _WIDTH.search(left):
            raise _beyond("a field of text")
        most = LONGEST if isinstance(left, Sized) else LONGEST**2
        if operator == "+" and _size(left) + _size(right) > most:
            raise _beyond("a sum")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, /, *args: Any, **options: Any) -> Any:
        """Call a function or method with arguments that are no bombs."""
        _check(args, options)
        return super().call(context, function, *args, **options)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format`, without widths that are bombs."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None and _WIDTH.search(value.__self__):
            raise _beyond("a field of text")
        return wrapped


def bounded(parts: Iterable[str]) -> Iterable[str]:
    """Pass a template's output on. Raises SecurityError where it gets longer than `LONGEST`."""
    total = 0
    for part in parts:
        total += len(part)
        if total > LONGEST:
            raise _beyond("the text")
        yield part


def bounded_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that refuses arguments beyond bounds before it computes anything."""

    @wraps(function)  # Jinja's marks on filters are attributes
    def call(*args: Any, **options: Any) -> Any:
        _check(args, options)
        if function.__name__ == "do_format" and args and _WIDTH.search(str(args[0])):
            raise _beyond("a field of text")
        return function(*args, **options)

    return call


def _check(args: tuple[Any, ...], options: dict[str, Any]) -> None:
    if not all(_is_small(value) for value in (*args, *options.values()) if type(value) is int):
        raise _beyond("an argument")


def _is_small(value: Any, most: int = LONGEST) -> bool:
    return isinstance(value, int | float) and -most <= value <= most


def _size(value: Any) -> int | float:
    """Items of a sequence, else how large a number is; 1 for anything else."""
    if isinstance(value, Sized):
        return len(value)
    return abs(value) if isinstance(value, int | float) else 1


def _beyond(what: str) -> SecurityError:
    return SecurityError(f"{what} would be larger than a chat can be ({LONGEST:,})")
