"""Templates compute what they compute in transformers; only they write control tokens."""

import itertools
import json
import re
import time
from functools import cache, lru_cache
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import _compile_jinja_template

from graphs.errors import MistralcError, UsageError
from runtime.text.chat_template import ChatTemplate, Part
from runtime.text.tokenizer import Tokenizer
from runtime.text.traced_text import TEMPLATE, TracedText, from_template, join, origins_of
from tests.support.vocabularies import SENTENCEPIECE, files

CONTROL = ("[INST]", "[/INST]", "<s>", "</s>", "<|user|>", "<|im_start|>")
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

# Text of a message; joined; assembled by a block, a macro, `~`; other values of a chat
VALUES = {
    "message": "messages[0].content",
    "joined": "('[INST]' + messages[0].content + '[/INST]')",
    "tilde": "('<s>' ~ messages[0].content ~ 5 ~ none ~ [messages[0].content, '<s>'])",
    "literal": "'[INST] Hello  x\\n<s>'",
    "block": "block",
    "macro": "body(messages[0].content)",
    "number": "messages[0].n",
    "text of a number": "messages[0].digits",
    "role": "messages[0].role",
    "token": "bos_token",
    "chat": "messages",
    "list": "['<s>', messages[0].content, messages[1].content]",
    "mapping": "{'<s>': messages[0].content, messages[1].content: '[INST]'}",
    "safe": "(('<s>' ~ messages[0].content) | safe)",
    "escaped": "(messages[0].content | escape)",
    "undefined": "nothing",
}
EXPRESSIONS = (
    "X", "X|string", "[X]|string", "(X,)|string", "{'k': X}|string", "X|tojson", "X|tojson|safe",
    "X|tojson(indent=2)", "X|tojson(ensure_ascii=true)", "X|tojson(sort_keys=true)", "X|pprint",
    "X|tojson(separators=(',', ':'))", "(X|tojson)[1:-1]", "'%r' % (X,)", "'%s|%s' % (X, '<s>')",
    "'%-30s|' % (X,)", "'%5d' % (X|length)", "'%%<s>%s' % (X,)", "'%(a)s<s>' % {'a': X}", "X % 'x'",
    "'12345678 * %s' % (X,)", "'<s>%s' | format(X)", "'{}<s>'.format(X)", "'{0}{0!r}'.format(X)",
    "'{:>30}|'.format(X)", "'{:{}}<s>'.format(X, 40)", "'{a[0]}<s>'.format(a=X)", "X.format('x')",
    "'{a}{{'.format_map({'a': X})", "'1234567 * {}'.format(X)", "X|upper", "X|lower", "X|title",
    "X|capitalize", "X.swapcase()", "X.casefold()", "X.title()", "X|trim", "X|trim('[< ')",
    "X.strip()", "X.strip('[<sI ')", "X.lstrip('[')", "X.rstrip(']>')", "X.split()", "X.split('I')",
    "X.split()|join('<s>')", "X.split(' ', 1)|last", "X.rsplit(None, 1)", "X.rsplit('s', 1)",
    "X.splitlines()", "X.splitlines(true)", "X.partition('IN')", "X.rpartition('N')",
    "X.replace('I', '<s>')", "X.replace('', '-')", "X.replace('', '<s>', 2)",
    "X.replace('I', 'i', 1)", "X|replace('[', '<')", "X|replace('s', '[INST]', 1)",
    "X|replace('hello', messages[1].content)", "X[0]", "X[-1]", "X[1:]", "X[:5]", "X[::-1]",
    "X[::2]", "X[2:-2]", "X|length", "X|reverse|list", "X|list", "X|first", "X|last", "X|join",
    "X|join('[INST]')", "X.join(['a', '<s>'])", "''.join([X, '<s>'])", "'<s>'.join([X, 'b'])",
    "range(3)|join(X)", "[1, 2, X]|join('<s>')", "X|join('<s>', attribute='role')", "X|indent",
    "X|indent(2, true, true)", "X|indent('<s>')", "X|wordwrap(5)", "X|wordwrap(8, true, '<s>')",
    "X|center(40)", "X.center(41, '*')", "X.ljust(40)", "X.rjust(40, '<')", "X.zfill(40)",
    "X.expandtabs(3)", "X|truncate(8)", "X|truncate(8, true, '</s>', 0)", "X|int", "X|float",
    "X|int + 1", "X|escape", "X|forceescape", "X|safe", "(X|safe) ~ '<s>'", "(X|safe) + '<x>'",
    "'<x>' + (X|safe)", "'%s<' % (X|safe)", "(X|safe) % ()", "[X|safe]|string", "X|striptags",
    "X|urlencode", "X|urlize", "X|wordcount", "X|default('<s>', true)", "X * 2", "2 * X",
    "X + '<s>'", "'<s>' + X", "X ~ '<s>' ~ X", "X in '[INST]x'", "'INST' in X", "X == 'hello'",
    "X != '[INST]'", "X < 'x'", "X is string", "X is mapping", "X is sequence", "X is number",
    "X is upper", "X in ['hello']", "X is eq('5')", "X and 1", "not X", "X if X else 2",
    "X.startswith('[INST]')", "X.endswith(('x', '>'))", "X.find('I')", "X.index('l')",
    "X.count('s')", "X.isdigit()", "X.isspace()", "X.encode()", "X.removeprefix('[INST]')",
    "X.removesuffix('>')", "X|sort|join", "X|unique|join", "X|batch(3)|list", "X|slice(3)|list",
    "X|min", "X|max", "X|sum", "X|groupby('role')|string", "X|dictsort|string", "X|items|list",
    "X.items()|list", "X.keys()|list", "X|map(attribute='content')|join('<s>')", "X|map('upper')",
    "X|selectattr('role', 'equalto', 'user')|list", "X|map('replace', 'I', 'J')|join", "X|xmlattr",
    "(X|attr('strip'))()", "X['strip']()", "X['content']", "X.content", "'<|' ~ X ~ '|>'",
    "X.translate({73: '<s>'})", "dict(a=X)", "namespace(a=X).a ~ '<s>'", "{X: 1}[X]",
    "cycler(X, '<s>').next() ~ '<s>'", "{'hello': '<s>'}[X]", "X|map('tojson')|join", "X.nothing",
    "X|lower|replace('inst', 'INST')|upper", "X|list|string", "strftime_now(X) is string",
)  # fmt: skip
STATEMENTS = (
    "{% for c in X %}{{ c }}<s>{% endfor %}",
    "{% set x %}<s>{{ X }}{% endset %}{{ x|trim }}{{ x[1:] }}",
    "{% filter upper %}[INST]{{ X }}{% endfilter %}",
    "{% call body(X) %}<s>{% endcall %}",
    "{% generation %}{% set q = 1 %}{{ X }}<s>{% endgeneration %}{{ q is defined }}",
    "{% autoescape true %}<s>{{ X }}{{ '<s>' ~ X }}{% set x %}<s>{{ X }}{% endset %}{{ x }}"
    "{% endautoescape %}",
    "{% set ns = namespace(t='') %}{% for c in X %}{% set ns.t = ns.t ~ c %}{% endfor %}{{ ns.t }}",
)
PREFIX = (
    "{% macro body(x) %}[INST]{{ x }}</s>{{ caller() if caller }}{% endmacro %}"
    "{% set block %}[INST] {{ messages[0].content }} <s>{% endset %}"
)
CONTENTS = (
    "hello", "[INST]", "x </s>\n<s> \"q\" 'p' \\ é", "5", " ß[IN\tST] &<b>\n\nline  two ", "",
    "\U00100000[INST]",
)  # fmt: skip


def chat(content: str) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": content, "n": 7, "digits": "12"},
        {"role": "assistant", "content": "a [/INST] b", "calls": [{"x": [1, None, content]}]},
    ]


def of(form: str, expression: str) -> str:
    """Put an expression in the place of X."""
    return re.sub(r"\bX\b", lambda _: expression, form)


def of_transformers(source: str, messages: list[dict[str, Any]]) -> str | None:
    """The text, or None if the template fails."""
    given = {"tools": None, "documents": None, "add_generation_prompt": True, **TOKENS}
    try:
        return str(_compile_jinja_template(source).render(messages=messages, **given))
    except Exception:
        return None


@lru_cache(maxsize=10)
def compiled(source: str) -> ChatTemplate:
    return ChatTemplate(source, control_tokens=CONTROL, variables=TOKENS)


def ours(source: str, messages: list[dict[str, Any]]) -> tuple[Part, ...] | None:
    try:
        return compiled(source).render(messages, add_generation_prompt=True)
    except (MistralcError, UsageError):
        return None


def text(parts: tuple[Part, ...] | None) -> str | None:
    return None if parts is None else "".join(part.text for part in parts)


def controls(parts: tuple[Part, ...] | None) -> list[str]:
    return [part.text for part in parts or () if part.control]


@pytest.mark.parametrize("value", VALUES)
def test_every_construct_writes_what_it_writes_in_transformers(value: str) -> None:
    written = 0
    for form in (*(f"{{{{ {e} }}}}" for e in EXPRESSIONS), *STATEMENTS):
        source = PREFIX + of(form, VALUES[value])
        for content in CONTENTS:
            expected = of_transformers(source, chat(content))
            if expected is not None and " at 0x" in expected:
                continue
            got = text(ours(source, chat(content)))
            assert got == expected, (form, content)
            written += got is not None
    assert written > 200


_SAFE = [e for e in EXPRESSIONS if not any(token in e for token in CONTROL)]


@pytest.mark.parametrize("value", ["message", "chat", "text of a number"])
def test_no_construct_makes_a_control_token_of_a_messages_text(value: str) -> None:
    for expression in _SAFE:
        source = "{{ " + of(expression, VALUES[value]) + " }}"
        for content in (*CONTROL, "".join(CONTROL), "[inst]", "[IN\nST]", "<>s", "]TSNI["):
            assert controls(ours(source, chat(content))) == [], (expression, content)


_KEEPS = (
    "X", "X|trim", "X.strip()", "X[:]", "X|replace('e', 'E')", "X.replace('e', '<s>')", "X|indent",
    "X.split()|join(' ')", "X.split('e')|join('e')", "X|upper", "[X]|string", "X|tojson", "X * 2",
    "X ~ 1", "'%s!' % X", "'%r' % (X,)", "'<s>{}'.format(X)", "'{0!r:}'.format(X)", "X|string",
    "X.splitlines()|join", "X|list|join", "X[::-1][::-1]", "X|reverse|reverse", "X.center(60)",
    "X|safe", "X|wordwrap(60)", "{'a': X}|tojson(indent=1)", "X|lower|replace('inst', 'INST')",
    "X.partition('l')|join", "X|truncate(999)", "X.expandtabs()", "X|default('')",
    "X.zfill(99)", "'%40s' % (X,)", "'{:40}'.format(X)", "[X, X]|join", "[1, X, none]|string",
)  # fmt: skip


@pytest.mark.parametrize("value", ["joined", "block", "macro", "literal"])
def test_a_template_that_edits_what_it_assembled_keeps_its_control_tokens(value: str) -> None:
    pattern = re.compile("|".join(map(re.escape, CONTROL)))
    for expression, content in itertools.product(_KEEPS, ("hello\tél", 'it\'s "so"')):
        source = PREFIX + "{{ " + of(expression, VALUES[value]) + " }}"
        parts = ours(source, chat(content))
        rendered = text(parts)
        assert rendered is not None
        assert rendered == of_transformers(source, chat(content))
        found = pattern.findall(rendered)
        assert found, expression
        assert controls(parts) == found, expression


_PIECES = st.text(st.sampled_from("[]<>/INSTs |user\n'\"\\\t5ß"), max_size=12)
_CONTENT = _PIECES | st.sampled_from(CONTROL) | st.text(max_size=5)
_STEPS = st.sampled_from([e for e in EXPRESSIONS if e.startswith("X") and "strftime" not in e])


@given(
    content=_CONTENT, other=_CONTENT, steps=st.lists(_STEPS, max_size=3),
    value=st.sampled_from(["message", "joined", "tilde", "block", "macro", "list", "mapping"]),
)  # fmt: skip
@settings(max_examples=250, deadline=None)
def test_chains_of_operations_write_what_they_write_in_transformers(
    content: str, other: str, steps: list[str], value: str
) -> None:
    expression = VALUES[value]
    for step in steps:
        expression = f"({of(step, expression)})"
    source = PREFIX + "{{ " + expression + " }}"
    messages = chat(content)
    messages[1]["content"] = other
    expected = of_transformers(source, messages)
    if expected is None or " at 0x" not in expected:
        assert text(ours(source, messages)) == expected


@given(content=_CONTENT, steps=st.lists(st.sampled_from(_SAFE), min_size=1, max_size=3))
@settings(max_examples=250, deadline=None)
def test_chains_of_operations_make_no_control_token_of_a_messages_text(
    content: str, steps: list[str]
) -> None:
    expression = VALUES["message"]
    for step in steps:
        expression = f"({of(step, expression)})"
    messages = chat(content)
    assert controls(ours("{{ " + expression + " }}", messages)) == []


@given(source=_PIECES, cut=st.integers(-9, 9), old=_PIECES, new=_PIECES, count=st.integers(-1, 4))
@settings(max_examples=300, deadline=None)
def test_each_character_of_a_result_keeps_its_origin(
    source: str, cut: int, old: str, new: str, count: int
) -> None:
    """The template wrote the upper-case letters and brackets, so origins can be read off."""

    def mine(characters: str) -> str:
        return join(from_template(c) if c in "[]INST" else c for c in characters)

    def check(result: str) -> None:
        expected = [TEMPLATE if c in "[]INST" else 0 for c in str.__iter__(result)]
        assert list(origins_of(result)) == expected

    traced = mine(source)
    assert isinstance(traced, TracedText)
    for result in (
        traced[cut:], traced[:cut], traced[::-1], traced + mine(old), traced * 2, traced.strip(),
        traced.strip(old), traced.replace(mine(old), mine(new), count), traced.replace(old, "-"),
        *traced.split(), *traced.split(None, 1), *traced.rsplit(None, 1), *traced.splitlines(),
        *traced.splitlines(True), *traced.partition(old or "x"), *traced.rpartition(old or "x"),
        *traced.split(old or "s", count), *traced.rsplit(old or "s", count), traced.join(mine(new)),
        traced.removeprefix(old), traced.removesuffix(old), traced.center(20), traced.rjust(9, "x"),
        traced.expandtabs(3), mine("%s[%s]").__mod__((traced, mine(old))),
    ):  # fmt: skip
        check(result)


# Roles, numbers, tokens


def test_a_role_or_a_number_is_a_part_of_a_token_but_not_all_of_one() -> None:
    source = "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' }}{{ m.role }}{{ m.n }}{% endfor %}"
    template = ChatTemplate(
        source, control_tokens=["<|user|>", "<|evil|>", "user", "7"], variables={}
    )
    parts = template.render(
        [{"role": "user", "n": 7}, {"role": "evil", "n": 7}], add_generation_prompt=True
    )
    assert controls(parts) == ["<|user|>"]
    assert text(parts) == "<|user|>user7<|evil|>evil7"


def test_a_number_of_a_message_cannot_spell_a_token() -> None:
    source = "{% for n in messages[0].n %}{{ '%c' % n }}{{ '{:c}'.format(n) }}{% endfor %}<s>"
    template = ChatTemplate(source, control_tokens=["<<//ss>>", "<s>"], variables={})
    message = {"role": "user", "n": list(b"</s>")}
    parts = template.render([message], add_generation_prompt=True)
    assert [part.text for part in parts] == ["<<//ss>>", "<s>"]
    assert controls(parts) == ["<s>"]


def test_a_role_that_the_template_compares_with_may_be_a_part_of_a_token() -> None:
    source = "{% if messages[0].role == 'critic' %}{{ '<|' ~ messages[0].role ~ '|>' }}{% endif %}"
    template = ChatTemplate(source, control_tokens=["<|critic|>"], variables={})
    parts = template.render([{"role": "critic", "content": ""}], add_generation_prompt=True)
    assert controls(parts) == ["<|critic|>"]


def test_a_message_beside_a_token_of_the_template_does_not_hide_it() -> None:
    template = ChatTemplate(
        "{{ messages[0].content }}<a>{{ messages[0].content }}",
        control_tokens=["<a>", "x<a", ">x"], variables={},
    )  # fmt: skip
    parts = template.render([{"role": "user", "content": "x"}], add_generation_prompt=True)
    assert [(part.text, part.control) for part in parts] == [
        ("x", False), ("<a>", True), ("x", False),
    ]  # fmt: skip


def test_a_message_of_all_private_use_characters_renders_at_once() -> None:
    content = "".join(map(chr, (*range(0xE000, 0xF900), *range(0xF0000, 0x110000)))) + "[INST]"
    start = time.monotonic()
    parts = ours("[INST]{{ messages[0].content | trim }}[/INST]", chat(content))
    assert text(parts) == f"[INST]{content}[/INST]"
    assert controls(parts) == ["[INST]", "[/INST]"]
    assert time.monotonic() - start < 2.0  # 0.01 s; a request used to hang


MARKS = ("<|fim_prefix|>", "<tool_call>", "<table>")


@cache
def with_marks(template: str) -> Tokenizer:
    """A tokenizer with three added tokens that are not flagged special."""
    converted = files(SENTENCEPIECE["v3"])
    backend = tokenizers.Tokenizer.from_str(converted.tokenizer_json)
    backend.add_tokens([tokenizers.AddedToken(mark, normalized=False) for mark in MARKS])
    config = {**converted.tokenizer_config, "chat_template": template}
    return Tokenizer(backend, config, converted.generation_config)


def test_control_tokens_that_are_not_flagged_special_are_the_templates_too() -> None:
    template = "<s>{% for m in messages %}[INST]{{ m.content }}<tool_call>{% endfor %}"
    tokenizer = with_marks(template)
    prefix, call, table = (tokenizer.encode(mark, add_bos=False)[-1] for mark in MARKS)
    ids = tokenizer.encode_chat([{"role": "user", "content": " ".join(MARKS)}])
    assert ids.count(call) == 1, "the template's"
    assert ids[-1] == call
    assert prefix not in ids
    assert table in ids, "the template does not write it, and it may be a word"
    assert tokenizer.decode([call]) == "<tool_call>", "an answer shows it"
    assert "<tool_call>" in json.dumps(tokenizer.decode(ids))
