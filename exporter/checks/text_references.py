"""Other programs' tokenizers, to compare a bundle's with. Each is used only where it is installed.

`transformers` for a Hugging Face directory, `mistral-common` and `sentencepiece` for Mistral's own
files, llama.cpp (`llama-cpp-python`) for GGUF. They are imported here and nowhere else.
"""

import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from exporter.checks.text_samples import Chat
from exporter.tokenizer.sentencepiece import SPACE
from exporter.tokenizer.text_files import TextFiles, read_text_files
from exporter.tokenizer.transformers_rules import reads_as_llama
from runtime.text.tokenizer import Tokenizer

Ids = list[int]

_PATH = re.compile(r"(?<![\w/])/[^\s'\",:;)]+")
_BREAK = "a\n"  # merges with nothing after it, so that what follows has no space before it


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A tokenizer of another program.

    `encode` returns the ids of a text, with BOS if `with_bos`. `chat` returns those of a chat; None
    if it formats none. It raises any exception for messages that it refuses. If it is not `final`,
    another program may overrule it; an `additional` one is asked even if one before it agreed.
    """

    name: str
    encode: Callable[[str], Ids]
    with_bos: bool
    chat: Callable[[Chat], Ids] | None = None
    final: bool = True
    additional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """Why there is nothing to compare with, in words."""

    why: str


def references(source: Path, ours: Tokenizer) -> Iterator[Reference | Missing]:
    """Yield what can be compared with, the program that the checkpoint is made for first."""
    if source.is_file():
        yield _opened("llama-cpp-python", lambda: _llama_cpp(source, ours))
        return
    files = read_text_files(source)
    first, own_chats = files.vocabularies[0], files.chat_template is None
    if files.tekken is not None and (first == files.tekken or first.name == "tokenizer.json"):
        path = files.tekken
        yield _opened("mistral-common", lambda: _mistral_common(path, chats=own_chats))
        if not own_chats:
            yield _opened("transformers", lambda: _tekken_chats(path, files, ours))
    elif first.name in ("tokenizer.json", "vocab.json"):
        yield from _transformers(files, ours)
    else:
        if files.tokenizer_class == "LlamaTokenizer":
            yield _opened("transformers", lambda: _auto_tokenizer(files, ours, final=False))
        yield _opened("sentencepiece", lambda: _pieces(files))
        if own_chats:
            yield _opened("mistral-common", lambda: _mistral_common(first, additional=True))
        else:
            yield _opened("transformers", lambda: _rendered_chats(files))


def _opened(distribution: str, open_it: Callable[[], Reference]) -> Reference | Missing:
    """Open a reference; any failure is the reason why there is none, without this host's paths."""
    try:
        return open_it()
    except ImportError:
        return Missing(why=f"{distribution} is not installed")
    except Exception as error:  # another program's, which may raise anything
        brief = _PATH.sub("…", " ".join(str(error).split()))[:200]
        return Missing(why=f"{distribution} does not open it ({type(error).__name__}: {brief})")


def _transformers(files: TextFiles, ours: Tokenizer) -> Iterator[Reference | Missing]:
    """AutoTokenizer; then, as it may apply a class's rules, tokenizer.json without these."""
    yield _opened("transformers", lambda: _auto_tokenizer(files, ours))
    if files.vocabularies[0].name == "tokenizer.json":
        yield _opened("transformers", lambda: _fast_tokenizer(files, ours))


def _auto_tokenizer(files: TextFiles, ours: Tokenizer, *, final: bool = True) -> Reference:
    library = _quiet_transformers()
    directory = str(files.directory)
    opened = library.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    # A class of its own may discard a part of tokenizer.json, which then counts.
    final = final and type(opened).__name__ == "TokenizersBackend"
    return _of_transformers("AutoTokenizer", opened, ours, final=final)


def _fast_tokenizer(files: TextFiles, ours: Tokenizer) -> Reference:
    library = _quiet_transformers()
    opened = library.PreTrainedTokenizerFast.from_pretrained(
        str(files.directory), local_files_only=True
    )
    return _of_transformers("PreTrainedTokenizerFast", opened, ours)


def _pieces(files: TextFiles) -> Reference:
    """SentencePiece, with the rule of transformers' LlamaTokenizer for the space before a text.

    LlamaTokenizer itself is not used for a model file: transformers 5 merges runs of spaces
    differently from SentencePiece, and AutoTokenizer drops a Mistral model's first space.
    """
    processor = _processor(files)
    first_only = reads_as_llama(files, {})

    def encode(text: str) -> Ids:
        if not first_only or text[:1] not in (" ", SPACE):
            return list(processor.encode(text))
        rest: Ids = processor.encode(text[1:])  # with the space that it begins with
        return rest or [processor.piece_to_id(SPACE)]

    name = f"sentencepiece {version('sentencepiece')}"
    return Reference(name=name, encode=encode, with_bos=False)


def _processor(files: TextFiles) -> Any:
    library = importlib.import_module("sentencepiece")
    return library.SentencePieceProcessor(model_file=str(files.vocabularies[0]))


def _rendered_chats(files: TextFiles) -> Reference:
    """Chats as transformers renders them; SentencePiece reads what is between control tokens."""
    library = _quiet_transformers()
    opened = library.LlamaTokenizer.from_pretrained(str(files.directory), local_files_only=True)
    pieces, processor = _pieces(files), _processor(files)
    added = {t.content: i for i, t in opened.backend_tokenizer.get_added_tokens_decoder().items()}
    control = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))))
    everywhere = not reads_as_llama(files, {})

    def inside(text: str) -> Ids:
        """What follows a control token: without the space, unless each text has one."""
        if everywhere:
            return pieces.encode(text)
        ids: Ids = processor.encode(_BREAK + text)[len(processor.encode(_BREAK)) :]
        return ids

    def chat(messages: Chat) -> Ids:
        text = _render(opened, messages)
        ids: Ids = []
        position = 0
        for match in control.finditer(text):
            between = text[position : match.start()]
            ids += (inside(between) if position else pieces.encode(between)) if between else []
            ids.append(added[match[0]])
            position = match.end()
        rest = text[position:]
        return ids + (inside(rest) if rest else [])

    name = f"transformers {version('transformers')} (chats)"
    return Reference(name=name, encode=pieces.encode, with_bos=False, additional=True, chat=chat)


def _render(opened: Any, messages: Chat) -> str:
    text: str = opened.apply_chat_template(
        [dict(message) for message in messages], tokenize=False,
        add_generation_prompt=messages[-1]["role"] != "assistant",
    )  # fmt: skip
    return text


def _tekken_chats(path: Path, files: TextFiles, ours: Tokenizer) -> Reference:
    """Chats with the checkpoint's own template, read by transformers' copy of the vocabulary."""
    module = importlib.import_module("transformers.integrations.mistral.tokenizer")
    opened = module.convert_tekken_tokenizer(str(path), chat_template=files.chat_template)
    return replace(
        _of_transformers("convert_tekken_tokenizer", opened, ours),
        name=f"transformers {version('transformers')} (chats)",
        encode=_mistral_common(path).encode, additional=True,
    )  # fmt: skip


def _of_transformers(called: str, opened: Any, ours: Tokenizer, *, final: bool = True) -> Reference:
    library = importlib.import_module("transformers")
    known = opened.backend_tokenizer.get_added_tokens_decoder()
    marks = [
        library.AddedToken(token.content, special=True, normalized=False)
        for i, token in known.items()
        if not token.special and i in ours.control_ids
    ]
    if marks:  # marks of turns, which count as control tokens here
        opened.add_tokens(marks, special_tokens=True)

    def encode(text: str) -> Ids:
        ids: Ids = opened.encode(text, add_special_tokens=True, split_special_tokens=True)
        return ids

    def chat(messages: Chat) -> Ids:
        ids: Ids = opened.apply_chat_template(
            [dict(message) for message in messages], tokenize=True, return_dict=False,
            add_generation_prompt=messages[-1]["role"] != "assistant",
        )  # fmt: skip
        return ids

    kind = type(opened).__name__
    detail = "" if kind == called else f" ({kind})"
    return Reference(
        name=f"transformers {version('transformers')} {called}{detail}",
        encode=encode,
        with_bos=True,
        chat=chat if opened.chat_template is not None else None,
        final=final,
    )


def _quiet_transformers() -> Any:
    library = importlib.import_module("transformers")
    library.logging.set_verbosity_error()
    return library


def _mistral_common(path: Path, *, chats: bool = True, additional: bool = False) -> Reference:
    instruct = importlib.import_module("mistral_common.protocol.instruct.request")
    tokenizers = importlib.import_module("mistral_common.tokens.tokenizers.mistral")
    opened = tokenizers.MistralTokenizer.from_file(str(path))
    inner = opened.instruct_tokenizer.tokenizer

    def encode(text: str) -> Ids:
        ids: Ids = inner.encode(text, bos=True, eos=False)
        return ids

    def chat(messages: Chat) -> Ids:
        request = instruct.ChatCompletionRequest(messages=[dict(each) for each in messages])
        ids: Ids = opened.encode_chat_completion(request).tokens
        return ids

    name = f"mistral-common {version('mistral-common')}"
    return Reference(
        name=name, encode=encode, with_bos=True, chat=chat if chats else None, additional=additional
    )


def _llama_cpp(path: Path, ours: Tokenizer) -> Reference:
    """llama.cpp, which reads our rendering of a chat: templates are not its tokenizer's."""
    library = importlib.import_module("llama_cpp")
    opened = library.Llama(str(path), vocab_only=True, verbose=False)

    def encode(text: str) -> Ids:
        ids: Ids = opened.tokenize(text.encode(), add_bos=True, special=False)
        return ids

    def chat(messages: Chat) -> Ids:
        prompt = messages[-1]["role"] != "assistant"
        text = ours.render_chat(messages, add_generation_prompt=prompt)
        ids: Ids = opened.tokenize(text.encode(), add_bos=False, special=True)
        return ids

    return Reference(
        name=f"llama-cpp-python {library.__version__}", encode=encode, with_bos=True,
        chat=chat if ours.has_chat_template else None,
    )  # fmt: skip
