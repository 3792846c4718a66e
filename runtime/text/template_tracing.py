"""Make Jinja trace which characters a template wrote. Knows nothing about messages or tokens.

Constants of the template become `TracedText`; what joins, formats or serializes text in Jinja's own
code is replaced by what keeps the origins. The rendered text is that of plain Jinja.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any

from jinja2 import filters, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.environment import Environment
from jinja2.exceptions import SecurityError
from jinja2.nodes import EvalContext
from jinja2.sandbox import SandboxedFormatter
from jinja2.utils import pass_eval_context
from markupsafe import Markup

from runtime.text.traced_text import (
    SafeText,
    TracedText,
    from_template,
    origins_of,
    recased,
    repr_of,
    respaced,
    text_of,
    verified,
    written,
)

_WIDE = re.compile(r"\d{6}")  # also in a field that is itself formatted
_JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


class TracingGenerator(CodeGenerator):
    """Generates code that calls an environment's `literal`, `text_of` and `concat`."""

    def visit_Const(self, node: nodes.Const, frame: Frame) -> None:  # noqa: N802  (Jinja's names)
        """Write a constant; text in it is the template's."""
        value = node.as_const(frame.eval_ctx)
        if isinstance(value, str | list | tuple | dict):
            self.write(f"environment.literal({value!r})")
        else:
            super().visit_Const(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        """Write the operator `~`."""
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            super().visit_Concat(node, frame)
            return
        self.write("environment.concat(map(environment.text_of, (")
        for operand in node.nodes:
            self.visit(operand, frame)
            self.write(", ")
        self.write(")))")

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return f"environment.literal({''.join(group)!r})"

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            super()._output_child_pre(node, frame, finalize)
        else:
            self.write("environment.text_of(")


def literal(value: Any) -> Any:
    """Return a constant of a template with its text traced."""
    match value:
        case Markup():
            return SafeText.of(from_template(str(value)))
        case str():
            return from_template(value)
        case list() | tuple():
            return type(value)(map(literal, value))
        case dict():
            return {literal(key): literal(item) for key, item in value.items()}
        case _:
            return value


def traced(value: Any) -> Any:
    """Give a plain string the methods that keep the origins of their arguments."""
    return TracedText(value) if type(value) is str else value


def plain(value: Any) -> Any:
    """Return `value` without origins, in nested lists and mappings too."""
    match value:
        case TracedText():
            return str.__str__(value)
        case list() | tuple() if type(value) in (list, tuple):
            return type(value)(map(plain, value))
        case dict() if type(value) is dict:
            return {plain(key): plain(item) for key, item in value.items()}
        case _:
            return value


class _Formatter(SandboxedFormatter):
    """Formats as `str.format` does, and keeps the fields."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.fields: list[str] = []

    def format_field(self, value: Any, format_spec: str) -> str:
        if _WIDE.search(format_spec):
            raise SecurityError("a field of text would be too wide for a chat")
        result: str = super().format_field(value, format_spec)
        if isinstance(value, str):
            self.fields.append(respaced(value, result))
        else:
            self.fields.append(text_of(value) if str(value) == result else result)
        return result

    def convert_field(self, value: Any, conversion: Any) -> Any:
        return repr_of(value) if conversion == "r" else super().convert_field(value, conversion)


def formatted(
    environment: Environment, form: str, values: tuple[Any, ...], named: Mapping[str, Any]
) -> str:
    """Return `form.format(*values, **named)` in the sandbox, traced.

    The text between the fields has the lowest origin of `form`.
    """
    formatter = _Formatter(environment)
    text = formatter.vformat(form, values, named)
    parsed = list(formatter.parse(form))
    fields = iter(formatter.fields)
    if sum(name is not None for _, name, _, _ in parsed) != len(formatter.fields):
        return text  # a field within a field
    lowest = bytes((min(origins_of(form), default=0),))
    pieces: list[str] = []
    for between, name, _, _ in parsed:
        pieces.append(TracedText(between, lowest * len(between)))
        if name is not None:
            pieces.append(next(fields))
    return verified(text, pieces)


@pass_eval_context
def _join(context: EvalContext, value: Any, d: str = "", attribute: str | None = None) -> str:
    if context.autoescape:
        escaped: str = filters.sync_do_join(context, value, d, attribute)
        return escaped
    if attribute is not None:
        value = map(filters.make_attrgetter(context.environment, attribute), value)
    return TracedText.join(traced(text_of(d)), map(text_of, value))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as Hugging Face's templates expect it, with no character escaped for HTML."""

    def encode(text: str) -> str:
        return json.dumps(text, ensure_ascii=ensure_ascii)

    options: Any = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
    text = json.dumps(value, ensure_ascii=ensure_ascii, **options)
    if sort_keys or '"' in f"{indent}{separators}":
        return text  # the strings may be in another order, or among others
    return written(value, text, _JSON_STRING, encode)


def _respacing(name: str) -> Callable[..., str]:
    filter_ = filters.FILTERS[name]

    @wraps(filter_)  # keeps the attributes by which Jinja marks filters
    def call(*args: Any, **options: Any) -> str:
        result = filter_(*map(plain, args), **options)
        source = next((text for text in args if isinstance(text, str)), "")
        return result if isinstance(result, Markup) else respaced(source, result)

    return call


def _on_text(name: str) -> Callable[..., str]:
    """Return a filter that begins with the text of its value."""
    filter_ = filters.FILTERS[name]

    @wraps(filter_)
    def call(*args: Any, **options: Any) -> str:
        *context, value = args[: 2 if hasattr(filter_, "jinja_pass_arg") else 1]
        result: str = filter_(*context, _string(value), *args[len(context) + 1 :], **options)
        return result

    return call


def _title(s: str) -> str:
    result = filters.do_title(str.__str__(text_of(s)))
    return recased(text_of(s), result)


def _string(value: Any) -> str:
    return value if isinstance(value, Markup) else text_of(value)


def _print(value: Any) -> str:
    return filters.do_pprint(plain(value))


_OF_TEXT = ("capitalize", "center", "lower", "replace", "trim", "upper")
TRACING_FILTERS: Mapping[str, Callable[..., Any]] = {
    "join": _join, "pprint": _print, "safe": SafeText.of, "string": _string, "title": _title,
    "tojson": _to_json, **{name: _on_text(name) for name in _OF_TEXT},
    "indent": _respacing("indent"), "wordwrap": _respacing("wordwrap"),
}  # fmt: skip
