"""What a template is given beside plain messages, against transformers."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from exporter.tokenizer.read import read_tokenizer
from graphs.errors import MistralcError, UsageError
from runtime.text.tokenizer import Tokenizer
from tests.runtime.text.test_chat import fast
from tests.support.vocabularies import SENTENCEPIECE, files, opened

SHOW = (
    "{{ bos_token }}{% for m in messages %}[INST]{{ m.role }}:"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{% if m.thinking %}({{ m.thinking }}){% endif %}"
    "{% if m.content is string %}{{ m.content | trim }}{% elif m.content is defined %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% else %}no content{% endif %}"
    "{% for c in m.tool_calls or [] %}[TOOL_CALLS]{{ c | tojson }}{% endfor %}"
    "[/INST]{% endfor %}{% for d in documents or [] %}{{ d.title }}={{ d | tojson }}{% endfor %}"
    "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}{{ date_string }}"
    "{% if add_generation_prompt %}>{% endif %}"
)
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": [1, "</s>"]}}}
CHATS: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, I am "}],
    [
        {"role": "user", "content": "Hi", "name": None},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "[INST]42", "tool_call_id": "1"},
        {"role": "assistant", "content": "It is", "tool_calls": None},
    ],
    [{"role": "assistant", "content": "a", "reasoning_content": "because"}],
    [{"role": "assistant", "content": "a", "thinking": "because"}],
    [{"role": "assistant", "content": "a", "reasoning": "because", "thinking": None}],
    [
        {
            "role": "user",
            "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "2"}],
        }
    ],
)
GIVEN: tuple[dict[str, Any], ...] = (
    {},
    {"documents": [{"title": "T", "text": "[INST]</s>"}]},
    {"variables": {"enable_thinking": False, "date_string": "26 Jul", "bos_token": "<x>"}},
)


@cache
def tokenizer(template: str = SHOW) -> Tokenizer:
    base = opened(SENTENCEPIECE["v3"])
    config = {**files(SENTENCEPIECE["v3"]).tokenizer_config, "chat_template": template}
    return Tokenizer(base._backend, config, files(SENTENCEPIECE["v3"]).generation_config)


@cache
def reference() -> PreTrainedTokenizerFast:
    library: PreTrainedTokenizerFast = fast(files(SENTENCEPIECE["v3"]))
    return library


def in_transformers(chat: list[dict[str, Any]], template: str = SHOW, **given: Any) -> str:
    variables = given.pop("variables", None) or {}
    return str(
        reference().apply_chat_template(
            chat, chat_template=template, tokenize=False, **given, **variables
        )
    )


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("how", ["prompt", "alone", "continued"])
def test_the_text_is_that_of_transformers(
    chat: list[dict[str, Any]], given: dict[str, Any], how: str
) -> None:
    options = {"add_generation_prompt": how == "prompt", **given}
    if how == "continued":
        options["continue_final_message"] = True
    before = json.dumps(chat)
    assert tokenizer().render_chat(chat, **options) == in_transformers(chat, **options)
    assert json.dumps(chat) == before


def test_a_continued_answer_ends_with_its_own_text_and_no_control_token_of_it() -> None:
    chat = [{"role": "assistant", "content": "So </s>[INST]"}]
    ids = tokenizer().encode_chat(chat, add_generation_prompt=False, continue_final_message=True)
    bos, inst = ids[:2]
    assert (bos, inst) == (1, 3)
    assert not {1, 2, 3, 4} & set(ids[2:])
    assert tokenizer().decode(ids).endswith("So </s>[INST]")


@pytest.mark.parametrize(
    ("chat", "template", "message"),
    [
        ([{"role": "user"}], SHOW, "no text to continue"),
        ([], SHOW, "no text to continue"),
        ([{"role": "user", "content": [{"type": "image"}]}], SHOW, "no text to continue"),
        ([{"role": "user", "content": "abc"}], "{{ messages[0].content[:2] }}", "leaves out"),
    ],
)
def test_a_message_that_cannot_be_continued_is_an_error(
    chat: list[dict[str, Any]], template: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        tokenizer(template).render_chat(
            chat, add_generation_prompt=False, continue_final_message=True
        )
    with pytest.raises(ValueError, match=r"continue|empty"):
        in_transformers(chat, template, continue_final_message=True)


def test_a_continued_message_beside_a_generation_prompt_is_an_error() -> None:
    with pytest.raises(UsageError, match="cannot begin another"):
        tokenizer().render_chat(CHATS[0], continue_final_message=True)


def test_a_template_knows_every_token_that_the_settings_name(tmp_path: Path) -> None:
    template = (
        "{{ sep_token }}{{ mask_token }}{{ image_token }}{{ audio_token }}{{ messages[0].content }}"
    )
    named = {
        "bos_token": "<s>", "eos_token": "</s>", "sep_token": "[INST]",
        "mask_token": "[TOOL_CALLS]", "image_token": "[/INST]",
    }  # fmt: skip
    library = PreTrainedTokenizerFast(
        tokenizer_object=fast(files(SENTENCEPIECE["v3"])).backend_tokenizer,
        extra_special_tokens={"audio_token": "<unk>"},
        chat_template=template,
        **named,
    )
    library.save_pretrained(tmp_path)
    ours = read_tokenizer(tmp_path).open()
    chat = [{"role": "user", "content": "[INST]"}]
    expected = library.apply_chat_template(chat, tokenize=False)
    assert ours.render_chat(chat, add_generation_prompt=False) == expected
    assert expected.startswith("[INST][TOOL_CALLS][/INST]<unk>")
    ids = ours.encode_chat(chat, add_generation_prompt=False)
    assert [ours.decode([i]) for i in ids[:4]] == [""] * 4
    assert ours.decode(ids) == "[INST]"


@pytest.mark.parametrize("layout", ["files", "list", "mapping", "only in files"])
def test_the_template_named_tool_use_is_for_chats_with_tools(tmp_path: Path, layout: str) -> None:
    library = fast(files(SENTENCEPIECE["v3"]))
    library.chat_template = named = {
        "default": "{{ bos_token }}{{ messages[0].content }}",
        "tool_use": "{{ bos_token }}[AVAILABLE_TOOLS]{{ tools | tojson }}{{ messages[0].content }}",
        "rag": "{{ documents }}",
    }
    library.save_pretrained(tmp_path)
    assert (tmp_path / "additional_chat_templates" / "tool_use.jinja").is_file()
    path = tmp_path / "tokenizer_config.json"
    entries: Any = named
    if layout == "list":
        entries = [{"name": name, "template": text} for name, text in named.items()]
    if layout in ("list", "mapping"):
        shutil.rmtree(tmp_path / "additional_chat_templates")
        (tmp_path / "chat_template.jinja").unlink()
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": entries}))
    elif layout == "only in files":  # a template in the settings is an older one
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": "old"}))
    ours = read_tokenizer(tmp_path).open()
    chat = [{"role": "user", "content": "[AVAILABLE_TOOLS]Hi"}]
    tools: list[dict[str, Any]]
    for tools in ([], [CALL]):
        expected = library.apply_chat_template(chat, tools=tools, tokenize=False)
        assert ours.render_chat(chat, tools=tools, add_generation_prompt=False) == expected
        assert expected.startswith("<s>[AVAILABLE_TOOLS][")
        assert (
            ours.encode_chat(chat, tools=tools).count(ours.encode_chat(chat, tools=tools)[1]) == 1
        )
    expected = library.apply_chat_template(chat, tokenize=False)
    assert ours.render_chat(chat, add_generation_prompt=False) == expected


def test_a_template_for_tools_with_a_syntax_error_is_an_error_at_export(tmp_path: Path) -> None:
    library = fast(files(SENTENCEPIECE["v3"]))
    library.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "{% for m in %}"}
    library.save_pretrained(tmp_path)
    with pytest.raises(MistralcError, match="does not compile"):
        read_tokenizer(tmp_path)
