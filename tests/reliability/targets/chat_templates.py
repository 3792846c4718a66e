"""Fuzz chat templates: generated from a grammar, or real ones with damage."""

from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from exporter.tokenizer.chat_formats import CHAT_TEMPLATES
from runtime.text.chat_template import ChatTemplate
from tests.reliability.harness.damage import Draw, damaged_bytes
from tests.reliability.harness.target import Prepared, Target
from tests.reliability.targets.tokenizers import CHAT, PIECES

EXPRESSIONS = (
    "messages", "messages[0]", "messages[0].content", "messages[0]['role']", "bos_token", "1", "-1",
    "'x'", "none", "true", "[1, 2]", "{'a': 1}", "loop.index", "x", "range(3)", "namespace(a=1)",
    "messages | length", "messages | first", "messages | last", "messages | map(attribute='role')",
    "messages | selectattr('role', 'equalto', 'user') | list", "messages | tojson",
    "messages[0].content | upper", "messages[0].content | trim", "messages[0].content.split(' ')",
    "messages[0].content.strip()", "messages[9]", "messages.nothing.more", "undefined_name",
    "strftime_now('%Y')", "raise_exception('no')", "cycler(1, 2)", "joiner()", "lipsum()",
    "self", "''.__class__", "x.__init__.__globals__", "messages.append(1)", "messages.__class__",
    "().__class__.__bases__", "cycler.__init__.__globals__.os", "dict(a=1)",
    "'x' | attr('__class__')",
    "'%s' % x", "'{}'.format(x)", "'{0.__class__}'.format(x)", "1 / 0", "'a' * 3", "'a' * 10**9",
    "10 ** 10 ** 10", "[0] * 10**9", "'%1000000000d' % 1", "'{:1000000000}'.format(1)",
    "'x' | center(1000000000)", "'x'.ljust(1000000000)", "'x'.zfill(1000000000)",
    "range(10**9)", "'x' | indent(1000000000)", "lipsum(1000000)", "[[1]] | sum(start=[])",
    "'a' * 999999999999", "x | tojson(indent=1000000000)", "'%*d' % (1000000000, 1)", "[1] + [2]",
)  # fmt: skip


@st.composite
def _statements(draw: Draw, depth: int = 0) -> str:
    """A template generated from a grammar, nested up to three levels."""

    def inner() -> str:
        return "" if depth == 2 else draw(_statements(depth + 1))

    parts = []
    for _ in range(draw(st.integers(1, 3))):
        one = draw(st.sampled_from(EXPRESSIONS))
        match draw(st.integers(0, 7)):
            case 0:
                parts.append("{% for x in " + one + " %}" + inner() + "{% endfor %}")
            case 1:
                parts.append("{% if " + one + " %}" + inner() + "{% else %}e{% endif %}")
            case 2:
                parts.append("{% set x = " + one + " %}")
            case 3:
                parts.append("{% macro m(x) %}" + inner() + "{{ m(x) }}{% endmacro %}{{ m(1) }}")
            case 4:
                parts.append(draw(st.sampled_from((
                    "{% include '/etc/passwd' %}", "{% extends 'x' %}", "{% import 'os' as o %}",
                    "{% generation %}x{% endgeneration %}", "{% break %}",
                    "{% set messages.x = 1 %}",
                    "{{ caller() }}", "{% call m(1) %}{% endcall %}", "{#", "{{", "{% raw %}",
                ))))  # fmt: skip
            case _:
                parts.append("{{ " + one + " }}")
    return "".join(parts)


def _template(folder: Path) -> Prepared:
    """Generated templates and damaged real ones, with messages of every shape."""
    real = st.sampled_from(sorted(CHAT_TEMPLATES.values())).flatmap(
        lambda text: damaged_bytes(text.encode()).map(lambda it: it.decode(errors="replace"))
    )
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
        lambda it: st.lists(it, max_size=3) | st.dictionaries(st.text(max_size=5), it, max_size=3),
        max_leaves=5,
    )
    message = st.fixed_dictionaries(
        {"role": st.sampled_from(("user", "assistant", "system", "tool", "x y"))},
        optional={"content": values | st.text(max_size=30), "name": values},
    )
    chats = st.lists(message, max_size=4)
    cases = st.fixed_dictionaries({"template": _statements() | real, "messages": chats})

    def read(case: dict[str, Any]) -> None:
        template = ChatTemplate(
            case["template"],
            control_tokens=PIECES,
            variables={"bos_token": "<s>", "eos_token": "</s>"},
        )
        parts = template.render(case["messages"], add_generation_prompt=True)
        assert all(part.text in PIECES for part in parts if part.control)
        secret = Path("/etc/passwd").read_text(encoding="utf-8")[:20]
        assert not any(secret in part.text for part in parts), "a template read a file"

    good = {"template": CHAT_TEMPLATES["v7"], "messages": CHAT}
    return Prepared(cases=cases, read=read, size=lambda case: len(repr(case)), good=good)


TARGETS = (Target(name="chat template", prepare=_template, examples=200),)
