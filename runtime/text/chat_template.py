"""Render chats with a chat template, to text and control tokens. Knows nothing about token ids.

Templates are Jinja in the dialect of Hugging Face, and the text is that of transformers. They come
from checkpoints, so they run in the immutable sandbox and may only write text. Messages must not be
able to write control tokens: one counts only if no character of it comes from a message, as
`runtime.text.traced_text` records.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser

from graphs.errors import MistralcError, UsageError
from runtime.text.chat_messages import before_tag, normalized, tagged
from runtime.text.template_sandbox import Sandbox
from runtime.text.traced_text import NEUTRAL, TEMPLATE, TracedText, from_template, origins_of

_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_KNOWN_ROLES = frozenset({
    "assistant", "context", "developer", "documents", "environment", "function", "ipython", "model",
    "observation", "system", "tool", "user",
})  # fmt: skip
_COMPARED = re.compile(r"""==\s*['"]([\w-]+)['"]""")  # what a template may compare a role with
_WRITTEN = re.compile(rb"[^\0]+")  # a run of characters that are not a message's


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of a rendered chat: a control token written by the template, or text."""

    text: str
    control: bool


class _Generation(Extension):
    """`{% generation %}` marks the model's text for training; here it is a scope and no more."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own interface)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


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
        self._variables = {
            name: from_template(value) if isinstance(value, str) else value
            for name, value in variables.items()
        }
        self._roles = _KNOWN_ROLES.union(_COMPARED.findall(source))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> tuple[Part, ...]:
        """Return the chat, split at the control tokens that the template wrote.

        `variables` are given to the template as they are, such as `enable_thinking`. With
        `continue_final_message` the chat ends where the last message's text ends.

        Raises UsageError if the template refuses the messages, MistralcError if it fails.
        """
        given = [self._with_role(message) for message in normalized(messages)]
        continued = ""
        if continue_final_message:
            if add_generation_prompt:
                raise UsageError(
                    "A chat that continues its last message cannot begin another; expected no "
                    "generation prompt. Set add_generation_prompt to false."
                )
            given, continued = tagged(given)
        chat = {
            "messages": given,
            "tools": None if tools is None else list(tools),
            "documents": None if documents is None else list(documents),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._template.render({**self._variables, **(variables or {}), **chat})
        except _Refusal as refusal:
            raise UsageError(
                "The chat template refuses these messages: "
                f"{_brief(str(refusal))} Give messages in the order and of the kinds "
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
                f"{_brief(str(error))}. Messages with `role` and `content` are "
                "expected; if these are, correct `chat_template` in tokenizer_config.json."
            ) from error
        if continue_final_message:
            text = before_tag(text, continued)
        return tuple(self._parts(text))

    def _parts(self, text: str) -> Iterator[Part]:
        origins, plain, position = origins_of(text), str.__str__(text), 0
        for run in _WRITTEN.finditer(origins):
            for match in self._control.finditer(plain, run.start(), run.end()):
                if TEMPLATE not in origins[match.start() : match.end()]:
                    continue  # a role or a number alone
                if match.start() > position:
                    yield Part(text=plain[position : match.start()], control=False)
                yield Part(text=match[0], control=True)
                position = match.end()
        if position < len(plain):
            yield Part(text=plain[position:], control=False)

    def _with_role(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Let a role that the template expects be a part of a control token, as in `<|user|>`."""
        role = message.get("role")
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            raise UsageError(
                f"A message's role is {role!r:.60}; a word such as `system`, `user` or "
                "`assistant` is expected."
            )
        if role not in self._roles:
            return dict(message)
        return {**message, "role": TracedText(role, bytes((NEUTRAL,)) * len(role))}


def _brief(message: str) -> str:
    """Shorten an error of the template or of Python to one line of at most 300 characters."""
    line = " ".join(message.split())
    return line if len(line) <= 300 else line[:297] + "..."


def _raise_exception(message: str) -> NoReturn:
    raise _Refusal(message)


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)
