"""Render chats with a chat template, to text and control tokens. Knows nothing about token ids.

Templates are Jinja in the dialect of Hugging Face. They come from checkpoints, so they run in the
immutable sandbox and may only write text. Messages must not be able to write control tokens:
`runtime.text.text_masking` prevents it.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser

from graphs.errors import MistralcError, UsageError
from runtime.text import text_masking
from runtime.text.template_sandbox import Sandbox, limit_arguments, limit_output
from runtime.text.text_masking import Mask

_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of a rendered chat: a control token written by the template, or text."""

    text: str
    control: bool


class _Generation(Extension):
    """`{% generation %}` marks the model's text for training; here it has no effect."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own interface)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Refusal(Exception):  # noqa: N818  (it never leaves this file)
    """A template called `raise_exception`."""


class ChatTemplate:
    """One compiled template. Raises MistralcError if its syntax is wrong."""

    def __init__(
        self, source: str, *, control_tokens: Collection[str], variables: Mapping[str, Any]
    ) -> None:
        environment = Sandbox(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[LoopControlExtension, _Generation],
            autoescape=False,  # the output is a prompt, not HTML
        )
        environment.concat = _join  # type: ignore[method-assign]
        environment.filters["tojson"] = limit_arguments(_to_json)
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # compiling evaluates constants too
            reason = _brief(str(getattr(error, "message", error)))
            raise MistralcError(
                f"The chat template does not compile: {reason} (line "
                f"{getattr(error, 'lineno', '?')} of the template). A Jinja template in Hugging "
                "Face's dialect is expected; correct `chat_template` in tokenizer_config.json."
            ) from error
        longest_first = sorted(control_tokens, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._alphabet = frozenset(c for c in "".join(longest_first) if not c.isspace())
        self._variables = dict(variables)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[Part, ...]:
        """Return the chat, split at the control tokens that the template wrote.

        Raises UsageError if the template refuses the messages, MistralcError if it fails.
        """
        strings = [*text_masking.strings_in(messages), *text_masking.strings_in(tools)]
        mask = Mask(self._alphabet, strings)
        masked = [_masked(message, mask) for message in messages]
        try:
            text = self._template.render(
                **self._variables,
                messages=masked,
                tools=None if tools is None else mask.hide(list(tools)),
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except _Refusal as refusal:
            raise UsageError(
                "The chat template refuses these messages: "
                f"{_brief(mask.reveal(str(refusal)))} Give messages in the order and of the kinds "
                "that the model was trained on."
            ) from refusal
        except jinja2.exceptions.SecurityError as error:
            raise MistralcError(
                f"The chat template was stopped: {_brief(str(error))}. A template may only write "
                "text; do not use this checkpoint's template unless you know why it does more."
            ) from error
        except Exception as error:  # anything an expression in the template can raise
            raise MistralcError(
                f"The chat template fails on these messages: {type(error).__name__}: "
                f"{_brief(mask.reveal(str(error)))}. Messages with `role` and `content` are "
                "expected; if these are, correct `chat_template` in tokenizer_config.json."
            ) from error
        return tuple(self._parts(text, mask))

    def _parts(self, text: str, mask: Mask) -> Iterator[Part]:
        plain, position = str.__str__(text), 0
        for match in self._control.finditer(plain):
            if match.start() > position:
                between = mask.reveal(plain[position : match.start()])
                yield Part(text=between, control=False)
            yield Part(text=match[0], control=True)
            position = match.end()
        if position < len(plain):
            yield Part(text=mask.reveal(plain[position:]), control=False)


def _masked(message: Mapping[str, Any], mask: Mask) -> dict[str, Any]:
    """Mask everything in a message but its role, from which templates build control tokens."""
    role = message.get("role")
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise UsageError(
            f"A message's role is {role!r:.60}; a word such as `system`, `user` or `assistant` is "
            "expected."
        )
    return {**{key: mask.hide(value) for key, value in message.items()}, "role": role}


def _join(parts: Iterable[str]) -> str:
    return text_masking.join(limit_output(parts))


def _brief(message: str) -> str:
    """Shorten an error of the template or of Python to one line of at most 300 characters."""
    line = " ".join(message.split())
    return line if len(line) <= 300 else line[:297] + "..."


def _raise_exception(message: str) -> NoReturn:
    raise _Refusal(message)


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as Hugging Face's templates expect it, with no character escaped for HTML."""
    dumps: Callable[..., str] = json.dumps
    options = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
    return dumps(value, ensure_ascii=ensure_ascii, **options)
