"""Encode text and chats to token ids, and decode ids. Knows nothing about checkpoints.

Reads the three tokenizer files of a bundle. The caller's text never becomes a control token:
`encode` treats control tokens as plain text, and in a chat only the control tokens written by the
template itself count.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack

import tokenizers

from graphs.errors import MistralcError
from runtime.text.detokenizer import Detokenizer, StreamDecoder

if TYPE_CHECKING:
    from runtime.text.chat_template import ChatTemplate

Messages = Sequence[Mapping[str, Any]]


class Given(TypedDict, total=False):
    """What a chat template gets beside the messages."""

    tools: Messages | None
    documents: Messages | None
    variables: Mapping[str, Any] | None
    continue_final_message: bool


_MARK = re.compile(r"<.+>|\[.+\]")
_ALWAYS_MARK = re.compile(r"<[|｜].+[|｜]>")
_TEMPLATE_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """A bundle's tokenizer.

    `tokenizer_config` has `bos_token_id`, `add_bos_token`, `chat_template` and the tokens that
    templates name; `generation_config` has `eos_token_id`, a list, and perhaps `stop_strings`,
    which end an answer too. Raises MistralcError if one of them has the wrong type.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        tokenizer_config: Mapping[str, Any],
        generation_config: Mapping[str, Any],
    ) -> None:
        _check_settings(tokenizer_config, generation_config)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # in a caller's text they are plain text
        self._backend = backend
        self._config = dict(tokenizer_config)
        self.bos_id: int | None = self._config.get("bos_token_id")
        self.stop_ids: frozenset[int] = frozenset(generation_config.get("eos_token_id", ()))
        self.stop_strings: tuple[str, ...] = tuple(generation_config.get("stop_strings", ()))
        self.vocab_size: int = backend.get_vocab_size()
        self._added = self._read_added_tokens()
        special = (i for i, token in self._added.items() if token.special)
        self._detokenizer = Detokenizer(backend, frozenset(special))

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read `tokenizer.json`, `tokenizer_config.json` and `generation_config.json`."""
        texts = {}
        for name in ("tokenizer", "tokenizer_config", "generation_config"):
            path = directory / f"{name}.json"
            try:
                texts[name] = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise MistralcError(
                    f"{path} cannot be read ({error}); a bundle's tokenizer consists of the files "
                    "tokenizer.json, tokenizer_config.json and generation_config.json. Export "
                    "the bundle again."
                ) from error
        return cls(
            parse_tokenizer(texts["tokenizer"], str(directory / "tokenizer.json")),
            _parse_object(texts["tokenizer_config"], directory / "tokenizer_config.json"),
            _parse_object(texts["generation_config"], directory / "generation_config.json"),
        )

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Return the ids of plain text; `add_bos` adds BOS if the checkpoint uses it."""
        ids = self._encode_text(self._backend, text)
        if add_bos and self.bos_id is not None and self._config.get("add_bos_token"):
            return [self.bos_id, *ids]
        return ids

    def decode(self, ids: Iterable[int], *, continuation: bool = False) -> str:
        """Return the text of ids, without control tokens.

        `continuation` keeps the leading space of a text that continues another.
        """
        return self._detokenizer.decode(ids, continuation=continuation)

    def stream(self, *, continuation: bool = False) -> StreamDecoder:
        """Return a decoder for ids that arrive one by one; its joined results are `decode(ids)`."""
        return self._detokenizer.stream(continuation=continuation)

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes of one token: none for control tokens, sometimes part of a character."""
        return self._detokenizer.bytes_of(token_id)

    def encode_chat(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = True,
        **given: Unpack["Given"],
    ) -> list[int]:
        """Return the ids of a chat, with BOS if the template writes it.

        `given` are `tools`, `documents`, `variables` and `continue_final_message` as in
        `ChatTemplate.render`.
        """
        parts = self._template_for(given).render(
            messages, add_generation_prompt=add_generation_prompt, **given
        )
        ids: list[int] = []
        for before, part, after in zip((None, *parts), parts, (*parts[1:], None), strict=False):
            if part.control:
                ids.append(self._chat_tokens[part.text])
                continue
            text = part.text
            if before is not None and self._added[self._chat_tokens[before.text]].rstrip:
                text = text.lstrip()
            if after is not None and self._added[self._chat_tokens[after.text]].lstrip:
                text = text.rstrip()
            backend = self._chat_backend if before is None else self._backend_inside
            ids += self._encode_text(backend, text)
        return ids

    def render_chat(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = True,
        **given: Unpack["Given"],
    ) -> str:
        """Return the chat as text, for display only; `encode_chat` gives the ids to run."""
        parts = self._template_for(given).render(
            messages, add_generation_prompt=add_generation_prompt, **given
        )
        return "".join(part.text for part in parts)

    def _template_for(self, given: Given) -> "ChatTemplate":
        """The template named `tool_use` if there is one and tools are given."""
        for_tools = None if given.get("tools") is None else self._tool_chat_template
        return for_tools or self._chat_template

    def compile_templates(self) -> None:
        """Raises MistralcError if there is no template or one is not valid."""
        _ = self._chat_template, self._tool_chat_template

    @cached_property
    def _chat_template(self) -> "ChatTemplate":
        source = self._config.get("chat_template")
        if source is None:
            raise MistralcError(
                "The bundle has no chat template, so messages cannot be formatted the way the "
                "model expects; its checkpoint has none either. Give it plain text instead, or "
                "export a checkpoint that is trained for chat."
            )
        return self._compiled(source)

    @cached_property
    def _tool_chat_template(self) -> "ChatTemplate | None":
        source = self._config.get("tool_chat_template")
        return None if source is None else self._compiled(source)

    def _compiled(self, source: str) -> "ChatTemplate":
        # Imported here: it takes 0.1 s, which plain text does not need.
        from runtime.text.chat_template import ChatTemplate

        named = {name: v for name, v in self._config.items() if name.endswith("_token")}
        return ChatTemplate(
            source,
            control_tokens=self._chat_tokens,
            variables={name: token for name, token in named.items() if isinstance(token, str)},
        )

    @property
    def has_chat_template(self) -> bool:
        """Whether chats can be encoded."""
        return self._config.get("chat_template") is not None

    @property
    def control_ids(self) -> frozenset[int]:
        """The ids of the special tokens, which no text becomes."""
        return frozenset(i for i, token in self._added.items() if token.special)

    @cached_property
    def _chat_tokens(self) -> dict[str, int]:
        """The control tokens of chats: special tokens, and marks that are not flagged special.

        These are tokens such as `<|fim_prefix|>`, or such as `<tool_call>` if the template writes
        it. In plain text they are tokens, and an answer shows them; a message must not write them.
        """
        templates = (self._config.get("chat_template"), self._config.get("tool_chat_template"))
        source = "\0".join(text for text in templates if text is not None)
        return {
            token.content: i
            for i, token in self._added.items()
            if token.special
            or _ALWAYS_MARK.fullmatch(token.content)
            or (_MARK.fullmatch(token.content) and token.content in source)
        }

    def _read_added_tokens(self) -> dict[int, tokenizers.AddedToken]:
        """Read the added tokens. BOS and EOS are special, even if the file says otherwise."""
        added = self._backend.get_added_tokens_decoder()
        ends = self.stop_ids if self.bos_id is None else self.stop_ids | {self.bos_id}
        for i in ends & added.keys():
            if not added[i].special:
                added[i].special = True
                self._backend.add_special_tokens([added[i]])
        return added

    @cached_property
    def _chat_backend(self) -> tokenizers.Tokenizer:
        """The tokenizer for text in chats, in which no control token of chats is recognized."""
        marks = set(self._chat_tokens.values()) - self.control_ids
        if not marks:
            return self._backend
        document = json.loads(self._backend.to_str())
        for entry in document["added_tokens"]:
            entry["special"] |= entry["id"] in marks
        return _opened(document)

    @cached_property
    def _backend_inside(self) -> tokenizers.Tokenizer:
        """The tokenizer for text after a control token.

        It differs only if Metaspace puts a space before the first word of the whole text (`first`).
        """
        pre_tokenizer = self._chat_backend.pre_tokenizer
        if not pre_tokenizer or not _never_prepend(json.loads(pre_tokenizer.__getstate__())):
            return self._chat_backend
        document = json.loads(self._chat_backend.to_str())
        _never_prepend(document["pre_tokenizer"])
        return _opened(document)

    @staticmethod
    def _encode_text(backend: tokenizers.Tokenizer, text: str) -> list[int]:
        try:
            ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            raise MistralcError(
                f"The text {text[:40]!r} cannot be encoded: it holds half of a UTF-16 surrogate "
                "pair. Valid Unicode is expected; decode the input with errors='replace'."
            ) from error
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # Rust's, which cannot be imported
                raise
            raise MistralcError(
                f"The tokenizer fails on the text {text[:40]!r} ({error}): the `tokenizers` "
                "package does not support its vocabulary. Get the checkpoint's tokenizer again, or "
                "update tokenizers."
            ) from error
        return ids


def parse_tokenizer(text: str, origin: str) -> tokenizers.Tokenizer:
    """Parse a `tokenizer.json`. `origin` names it in errors.

    Raises MistralcError if the `tokenizers` library cannot read it.
    """
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exceptions
        raise MistralcError(
            f"{origin} cannot be read as a tokenizer ({error!s:.300}). A tokenizer.json of the "
            "`tokenizers` library is expected; the file is damaged or cut short: get it again."
        ) from error


def _opened(document: Mapping[str, Any]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_str(json.dumps(document))
    backend.encode_special_tokens = True
    return backend


def _parse_object(text: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MistralcError(f"{path} is not JSON ({error}). Export the bundle again.") from error
    if not isinstance(value, dict):
        raise MistralcError(
            f"{path} holds a {type(value).__name__}; a JSON object is expected. Export the "
            "bundle again."
        )
    return value


def _check_settings(config: Mapping[str, Any], generation: Mapping[str, Any]) -> None:
    """Raise MistralcError for the first setting of the wrong type."""
    texts = (*_TEMPLATE_TOKENS, "chat_template", "tool_chat_template")
    bos, stops = config.get("bos_token_id"), generation.get("eos_token_id", ())
    wrong = {name: "text" for name in texts if not isinstance(config.get(name), str | None)}
    if not isinstance(config.get("add_bos_token"), bool | None):
        wrong |= {"add_bos_token": "true or false"}
    if bos is not None and not is_token_id(bos):
        wrong |= {"bos_token_id": "a token id"}
    if not isinstance(stops, list | tuple) or not all(map(is_token_id, stops)):
        wrong |= {"eos_token_id": "a list of token ids"}
    ends = generation.get("stop_strings", ())
    if not isinstance(ends, list | tuple) or not all(isinstance(s, str) and s for s in ends):
        wrong |= {"stop_strings": "a list of texts"}
    for name, expected in wrong.items():
        value = (generation if name in ("eos_token_id", "stop_strings") else config).get(name)
        raise MistralcError(
            f"The tokenizer's setting `{name}` is {value!r:.60}; {expected} is expected. Correct "
            "the checkpoint's tokenizer_config.json or generation_config.json, or export the "
            "bundle again."
        )


def is_token_id(value: object) -> bool:
    """Whether `value` can be a token id: an integer in the backend's range."""
    return type(value) is int and 0 <= value < 2**31


def _never_prepend(pre_tokenizer: Any) -> bool:
    """Change `first` to `never` in every Metaspace; returns whether there was one."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    first = [step for step in steps if step.get("prepend_scheme") == "first"]
    for step in first:
        step["prepend_scheme"] = "never"
    return bool(first)
