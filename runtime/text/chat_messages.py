"""Give messages the form in which chat templates expect them, as transformers does.

Source: `apply_chat_template` and `render_jinja_template` of transformers 5.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from graphs.errors import UsageError

_REASONING = ("reasoning_content", "thinking", "reasoning")  # one thing under three names
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


def normalized(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Drop what is None, such as the content beside tool calls; name reasoning in every way."""
    return [_aliased({k: v for k, v in message.items() if v is not None}) for message in messages]


def _aliased(message: dict[str, Any]) -> dict[str, Any]:
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def tagged(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Mark the end of the last message's text; returns the messages and that text.

    Raises UsageError if the last message has no text.
    """
    last = messages[-1] if messages else {}
    content = last.get("content")
    if isinstance(content, str):
        return [*messages[:-1], {**last, "content": content + _TAG}], content
    parts = list(content) if isinstance(content, list | tuple) else []
    for i in reversed(range(len(parts))):
        if isinstance(parts[i], Mapping) and isinstance(text := parts[i].get("text"), str):
            parts[i] = {**parts[i], "text": text + _TAG}
            return [*messages[:-1], {**last, "content": parts}], text
    raise UsageError(
        "The last message has no text to continue; expected a message whose content is text. "
        "End the chat with the beginning of the answer, or do not continue the last message."
    )


def before_tag(text: str, continued: str) -> str:
    """Cut a rendered chat where the last message's text ends.

    Raises UsageError if the template left that text out.
    """
    if continued.strip() not in text or _TAG.strip() not in text:
        raise UsageError(
            "The last message cannot be continued: the chat template leaves out a part of it; "
            "expected its text in the chat. Ask for an answer of its own instead."
        )
    at = text.rindex(_TAG.strip())
    return text[:at] if text[at:].startswith(_TAG) else text[:at].rstrip()
