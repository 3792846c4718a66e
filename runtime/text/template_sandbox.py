"""Limit what one expression of a template can produce, in Jinja's sandbox.

Jinja's sandbox denies a template files, Python's internals and changes to its values. It does not
stop `'a' * 10**10` or `10 ** 10 ** 10` from taking all memory or time, and Jinja evaluates
constants while it compiles. So operators, arguments, field widths and the length of text that is
joined or written are limited here. The number of steps is not limited: nested loops may run for any
time, and text that `replace` multiplies may grow until it is written.

The sandbox also traces which characters the template wrote (`runtime.text.template_tracing`).
"""

import re
from collections.abc import Callable, Iterable, Sized
from functools import update_wrapper, wraps
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

from runtime.text.template_tracing import (
    TRACING_FILTERS,
    TracingGenerator,
    formatted,
    literal,
    traced,
)
from runtime.text.traced_text import TracedText, join, text_of

MAX_LENGTH = 4_000_000  # characters or items, about a million tokens
_MAX_EXPONENT = 64
# A width of 100,000 or more, or given as an argument
_PERCENT_WIDTH = re.compile(r"%(?:\([^)]*\))?[^a-zA-Z%]*(?:\d{6}|\*)")
_BRACES_WIDTH = re.compile(r"\{[^{}]*:[^{}]*\d{6}")


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment for chat templates. Raises SecurityError if a limit is exceeded."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})
    code_generator_class = TracingGenerator
    text_of = staticmethod(text_of)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        del self.globals["lipsum"]  # writes any amount of text, and no chat needs it
        all_filters = {**self.filters, **TRACING_FILTERS}
        self.filters = {name: limit_arguments(f) for name, f in all_filters.items()}
        self._literals: dict[str, str] = {}

    def concat(self, parts: Iterable[str]) -> str:
        """Join a template's output."""
        return join(limit_output(parts))

    def literal(self, value: Any) -> Any:
        """Return a constant of the template, traced; the same text is the same object."""
        if type(value) is not str:
            return literal(value)
        if value not in self._literals:
            self._literals[value] = literal(value)
        return self._literals[value]

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Return an attribute; the methods of text keep origins."""
        return super().getattr(traced(obj) if attribute in _TEXT_METHODS else obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Return an item, or else an attribute."""
        is_method = isinstance(argument, str) and argument in _TEXT_METHODS
        return super().getitem(traced(obj) if is_method else obj, argument)

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
        if operator == "%" and isinstance(left, str) and _PERCENT_WIDTH.search(left):
            raise _too_large("a field of text")
        limit = MAX_LENGTH if isinstance(left, Sized) else MAX_LENGTH**2
        if operator == "+" and _size(left) + _size(right) > limit:
            raise _too_large("a sum")
        return super().call_binop(context, operator, traced(left), right)

    def call(self, context: Context, function: Any, /, *args: Any, **options: Any) -> Any:
        """Call a function or method after checking that no argument is too large."""
        _check(args, options)
        return super().call(context, function, *args, **options)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return `str.format`, or `format_map`, after checking that no field is too large."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        form = value.__self__
        if _BRACES_WIDTH.search(form):
            raise _too_large("a field of text")
        if isinstance(form, Markup):
            return wrapped
        is_map = value.__name__ == "format_map"

        def call(*args: Any, **options: Any) -> str:
            if not is_map:
                return formatted(self, form, args, options)
            if options or len(args) != 1:
                raise TypeError("format_map() takes exactly one argument")
            return formatted(self, form, (), args[0])

        return update_wrapper(call, value)


_TEXT_METHODS = frozenset(vars(TracedText)) | {"format", "format_map"}


def limit_output(parts: Iterable[str]) -> Iterable[str]:
    """Yield a template's output. Raises SecurityError if it exceeds `MAX_LENGTH`."""
    total = 0
    for part in parts:
        total += len(part)
        if total > MAX_LENGTH:
            raise _too_large("the text")
        yield part


def limit_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter so that it refuses too large arguments before it computes anything.

    Text keeps its origins in it.
    """

    @wraps(function)  # keeps the attributes by which Jinja marks filters
    def call(*args: Any, **options: Any) -> Any:
        _check(args, options)
        if function.__name__ == "do_format" and args and _PERCENT_WIDTH.search(str(args[0])):
            raise _too_large("a field of text")
        return function(*map(traced, args), **{name: traced(v) for name, v in options.items()})

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
