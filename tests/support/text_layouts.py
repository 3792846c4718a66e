"""Directories with every layout of tokenizer files, with small vocabularies.

Made with the libraries that define the files: sentencepiece, tokenizers, transformers and Mistral's
own data. `LAYOUTS` maps the name of a layout to the function that writes it.
"""

import importlib
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import models, normalizers, processors

from exporter.tokenizer.transformers_rules import MISTRAL_SPLIT
from tests.support.text_vocabularies import CHATML, PIECES, WORDS, Vocabularies, byte_level
from tests.support.vocabularies import SENTENCEPIECE, TEKKEN

Json = dict[str, Any]

INST = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write(folder: Path, name: str, content: Json) -> None:
    """Write a JSON file."""
    (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def config(folder: Path, model_type: str, rows: int, **more: Any) -> None:
    """Write the part of `config.json` that tokenizers depend on."""
    write(folder, "config.json", {
        "model_type": model_type, "vocab_size": rows, "eos_token_id": 2, "bos_token_id": 1, **more,
    })  # fmt: skip


def entry(i: int, content: str, *, special: bool = True, **flags: bool) -> Json:
    """An added token as `tokenizer.json` has it."""
    return {
        "id": i, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": not special, "special": special, **flags,
    }  # fmt: skip


def decoder(*entries: Json) -> Json:
    """The same tokens as `added_tokens_decoder` has them."""
    return {str(e["id"]): {k: v for k, v in e.items() if k != "id"} for e in entries}


# SentencePiece, and what transformers makes of it

_BASE = (entry(0, "<unk>"), entry(1, "<s>"), entry(2, "</s>"))
_CHAT_TOKENS = (entry(PIECES, "<|im_end|>"), entry(PIECES + 1, "<|im_start|>"))
_AS_TEXT = (entry(PIECES, "<|im_end|>"), entry(PIECES + 1, "<|im_start|>", special=False))
_SETTINGS: Json = {
    "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "<|im_end|>",
    "unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False, "chat_template": CHATML,
}  # fmt: skip


def _llama_json(vocabularies: Vocabularies, added: tuple[Json, ...] = ()) -> Json:
    """The form in which transformers 4 saved Llama's and Mistral's tokenizers."""
    library = _transformers()
    saved = library.LlamaTokenizer(*_extracted(vocabularies.model))
    document: Json = json.loads(saved.backend_tokenizer.to_str())
    document["added_tokens"] = [*_BASE, *added]
    document["pre_tokenizer"] = None
    document["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    document["post_processor"] = _bos_first("<s>", 1)
    return document


def _transformers() -> Any:
    """The library, imported when it is needed: it takes seconds."""
    return importlib.import_module("transformers")


@cache
def _extracted(model: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The pieces and merges of a SentencePiece model, as transformers reads them."""
    extractor = importlib.import_module("transformers.convert_slow_tokenizer")
    found = extractor.SentencePieceExtractor(str(model)).extract(models.BPE)
    return found["vocab"], found["merges"]


def _bos_first(token: str, i: int) -> Json:
    made = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, i)]
    )
    state: Json = json.loads(made.__getstate__())
    return state


def hermes(vocabularies: Vocabularies, folder: Path) -> None:
    """OpenHermes without tokenizer.json: the chat's tokens in added_tokens.json."""
    (folder / "tokenizer.model").write_bytes(vocabularies.model.read_bytes())
    config(folder, "mistral", PIECES + 2, eos_token_id=PIECES)
    write(folder, "added_tokens.json", {"<|im_end|>": PIECES, "<|im_start|>": PIECES + 1})
    write(folder, "special_tokens_map.json", {
        "bos_token": "<s>", "eos_token": {"content": "<|im_end|>", "lstrip": False,
        "normalized": False, "rstrip": False, "single_word": False}, "unk_token": "<unk>",
    })  # fmt: skip
    write(folder, "tokenizer_config.json", {**_SETTINGS, "legacy": True})


def hermes_not_legacy(vocabularies: Vocabularies, folder: Path) -> None:
    """The same with `legacy: false`, and the tokens in added_tokens_decoder."""
    (folder / "tokenizer.model").write_bytes(vocabularies.model.read_bytes())
    config(folder, "llama", PIECES + 2)
    tokens = decoder(*_BASE, *_AS_TEXT)
    write(folder, "tokenizer_config.json",
          {**_SETTINGS, "legacy": False, "added_tokens_decoder": tokens})  # fmt: skip


def hermes_json(vocabularies: Vocabularies, folder: Path) -> None:
    """OpenHermes with tokenizer.json, in which `<|im_start|>` is text."""
    config(folder, "mistral", PIECES + 2)
    write(folder, "tokenizer.json", _llama_json(vocabularies, _AS_TEXT))
    tokens = decoder(*_BASE, *_AS_TEXT)
    write(folder, "tokenizer_config.json",
          {**_SETTINGS, "legacy": True, "added_tokens_decoder": tokens})  # fmt: skip


def older_json_with_decoder(vocabularies: Vocabularies, folder: Path) -> None:
    """A base model's tokenizer.json beside the fine-tune's added_tokens_decoder."""
    config(folder, "mistral", PIECES + 64)
    write(folder, "tokenizer.json", _llama_json(vocabularies))
    tokens = decoder(*_BASE, *_CHAT_TOKENS)
    write(folder, "tokenizer_config.json", {**_SETTINGS, "added_tokens_decoder": tokens})


def older_json_with_added_tokens(vocabularies: Vocabularies, folder: Path) -> None:
    """A base model's tokenizer.json beside added_tokens.json and special_tokens_map.json."""
    config(folder, "mistral", PIECES + 2)
    write(folder, "tokenizer.json", _llama_json(vocabularies))
    write(folder, "added_tokens.json", {"<|im_end|>": PIECES, "<|im_start|>": PIECES + 1})
    write(folder, "special_tokens_map.json", {
        "bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>",
        "additional_special_tokens": ["<|im_start|>"],
    })  # fmt: skip
    write(folder, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer",
                                            "chat_template": CHATML})  # fmt: skip


def named_only(vocabularies: Vocabularies, folder: Path) -> None:
    """Tokens that settings name and no file numbers."""
    config(folder, "mistral", PIECES + 2)
    write(folder, "tokenizer.json", _llama_json(vocabularies))
    write(folder, "tokenizer_config.json",
          {**_SETTINGS, "additional_special_tokens": ["<|im_start|>"]})  # fmt: skip


def llama2(vocabularies: Vocabularies, folder: Path) -> None:
    """Llama 2: a space before every text in tokenizer.json, and `legacy: false` beside it."""
    config(folder, "llama", PIECES)
    write(folder, "tokenizer.json", _llama_json(vocabularies))
    write(folder, "tokenizer_config.json",
          {**_SETTINGS, "eos_token": "</s>", "legacy": False, "chat_template": INST})  # fmt: skip


def llama1(vocabularies: Vocabularies, folder: Path) -> None:
    """Llama 1 and fine-tunes: the same with `legacy: true`, BOS off in the settings alone."""
    config(folder, "llama", PIECES)
    write(folder, "tokenizer.json", _llama_json(vocabularies))
    write(folder, "tokenizer_config.json", {
        **_SETTINGS, "eos_token": "</s>", "legacy": True, "add_bos_token": False,
        "chat_template": INST,
    })  # fmt: skip


def phi3(vocabularies: Vocabularies, folder: Path) -> None:
    """Phi-3: marks that drop the spaces after them, and LlamaTokenizer in name only."""
    marks = tuple(
        entry(PIECES + i, text, rstrip=True)
        for i, text in enumerate(("<|end|>", "<|user|>", "<|assistant|>", "<|system|>"))
    )
    config(folder, "phi3", PIECES + 100, eos_token_id=PIECES)
    write(folder, "tokenizer.json", _llama_json(vocabularies, marks))
    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    write(folder, "tokenizer_config.json", {
        **_SETTINGS, "eos_token": "<|end|>", "legacy": False, "chat_template": template,
        "added_tokens_decoder": decoder(*_BASE, *marks),
    })  # fmt: skip


def gemma2(vocabularies: Vocabularies, folder: Path) -> None:
    """Gemma 2, saved by transformers: no space in front, and roles of its own."""
    library = _transformers()
    words, merges = _extracted(vocabularies.model)
    ends = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "mask_token": None}
    marks = ["<start_of_turn>", "<end_of_turn>"]
    tokenizer = library.GemmaTokenizer(
        dict(words), list(merges), add_bos_token=True, extra_special_tokens=marks, **ends
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
        "{{ '<start_of_turn>' + (m['role'] | replace('assistant', 'model')) + '\n' + "
        "m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    config(folder, "gemma2", len(tokenizer))


def native_sentencepiece(_vocabularies: Vocabularies, folder: Path) -> None:
    """Mistral's own tokenizer.model.v3 and params.json."""
    write(folder, "params.json", {"vocab_size": 32768})
    (folder / "tokenizer.model.v3").write_bytes(SENTENCEPIECE["v3"].read_bytes())


def _small_tekken(folder: Path, words: int = 3000) -> None:
    content = json.loads(TEKKEN["240911"].read_bytes())
    content["vocab"] = content["vocab"][:words]
    content["config"] |= {"default_vocab_size": words + 1000, "default_num_special_tokens": 1000}
    write(folder, "tekken.json", content)


def native_tekken(_vocabularies: Vocabularies, folder: Path) -> None:
    """Mistral's own tekken.json and params.json."""
    write(folder, "params.json", {"vocab_size": 4000})
    _small_tekken(folder)


def tekken_with_template(_vocabularies: Vocabularies, folder: Path) -> None:
    """tekken.json with a chat template of the checkpoint's own."""
    _small_tekken(folder)
    config(folder, "mistral", 4000)
    (folder / "chat_template.jinja").write_text(INST, encoding="utf-8")


def sentencepiece_with_template(vocabularies: Vocabularies, folder: Path) -> None:
    """tokenizer.model, added_tokens.json and a template, but no tokenizer class."""
    hermes(vocabularies, folder)
    (folder / "special_tokens_map.json").unlink()
    write(folder, "tokenizer_config.json", {"eos_token": "<|im_end|>", "chat_template": CHATML})


def tekken_beside_wrong_json(_vocabularies: Vocabularies, folder: Path) -> None:
    """A right tekken.json beside a tokenizer.json with another expression, and a newer token."""
    from exporter.tokenizer import tekken

    _small_tekken(folder)
    config(folder, "mistral", 4001)
    document = tekken.to_document(tekken.read_tekken(folder / "tekken.json"))
    document["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": LLAMA3_SPLIT}
    document["post_processor"] = _bos_first("<s>", 1)
    write(folder, "tokenizer.json", document)
    write(folder, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast",
                                            "bos_token": "<s>", "eos_token": "</s>"})  # fmt: skip


# Byte-level vocabularies


def llama3(vocabularies: Vocabularies, folder: Path) -> None:
    """Llama 3: byte-level, BOS from the post-processor although the settings say no."""
    special = (
        "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
        "<|eot_id|>",
    )  # fmt: skip
    backend, size = byte_level(vocabularies, LLAMA3_SPLIT, special, bos=True)
    backend.save(str(folder / "tokenizer.json"))
    config(folder, "llama", size, bos_token_id=WORDS, eos_token_id=[WORDS + 1, WORDS + 4])
    template = (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
        "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    )
    write(folder, "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": special[0],
        "eos_token": "<|eot_id|>", "add_bos_token": False, "chat_template": template,
        "added_tokens_decoder": decoder(*(entry(WORDS + i, t) for i, t in enumerate(special))),
    })  # fmt: skip


_QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def _qwen2_tokenizer(vocabularies: Vocabularies) -> Any:
    library = _transformers()
    words = {**vocabularies.words, **{t: WORDS + i for i, t in enumerate(_QWEN)}}
    named = {"eos_token": "<|im_end|>", "extra_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    tokenizer = library.Qwen2Tokenizer(words, list(vocabularies.merges), **named)
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    tokenizer.chat_template = CHATML
    return tokenizer


def qwen2(vocabularies: Vocabularies, folder: Path) -> None:
    """Qwen2.5 and Qwen3, saved by transformers: NFC, and tokens that are text."""
    tokenizer = _qwen2_tokenizer(vocabularies)
    tokenizer.save_pretrained(folder)
    config(folder, "qwen2", WORDS + 128)


def qwen2_pairs(vocabularies: Vocabularies, folder: Path) -> None:
    """Qwen2 as vocab.json and merges.txt."""
    write(folder, "vocab.json", dict(vocabularies.words))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in vocabularies.merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    config(folder, "qwen2", WORDS + 3)
    write(folder, "tokenizer_config.json", {
        "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "chat_template": CHATML,
        "pad_token": "<|endoftext|>", "unk_token": None,
        "added_tokens_decoder": decoder(*(entry(WORDS + i, t) for i, t in enumerate(_QWEN))),
    })  # fmt: skip


def smollm2(vocabularies: Vocabularies, folder: Path) -> None:
    """SmolLM2: digits apart, which transformers 5's GPT2Tokenizer forgets."""
    backend, size = byte_level(vocabularies, None, _QWEN)
    backend.save(str(folder / "tokenizer.json"))
    config(folder, "llama", size)
    write(folder, "tokenizer_config.json", {
        "tokenizer_class": "GPT2Tokenizer", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>", "chat_template": CHATML,
    })  # fmt: skip


def granite(vocabularies: Vocabularies, folder: Path) -> None:
    """Granite 3: the same kind, which transformers reads as it is in the file."""
    special = ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>")
    backend, size = byte_level(vocabularies, None, special)
    backend.save(str(folder / "tokenizer.json"))
    config(folder, "granite", size + 5)
    template = (
        "{% for m in messages %}{{ '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + "
        "m['content'] + '<|end_of_text|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
    )
    write(folder, "tokenizer_config.json", {
        "tokenizer_class": "GPT2Tokenizer", "bos_token": special[0], "eos_token": special[0],
        "pad_token": special[0], "add_bos_token": False, "chat_template": template,
    })  # fmt: skip


def smollm3(vocabularies: Vocabularies, folder: Path) -> None:
    """SmolLM3 and Phi-4: Llama 3's expression without BOS, the template in a file of its own."""
    backend, size = byte_level(vocabularies, LLAMA3_SPLIT, _QWEN)
    backend.save(str(folder / "tokenizer.json"))
    config(folder, "smollm3", size)
    write(folder, "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "bos_token": None,
    })  # fmt: skip
    (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")


def nemo_json(vocabularies: Vocabularies, folder: Path) -> None:
    """Mistral Nemo's tokenizer.json: tekken's expression, BOS from the post-processor."""
    special = ("<s>", "</s>", "[INST]", "[/INST]")
    backend, size = byte_level(vocabularies, MISTRAL_SPLIT, special, bos=True)
    backend.normalizer = normalizers.Sequence([])
    backend.save(str(folder / "tokenizer.json"))
    config(folder, "mistral", size, bos_token_id=WORDS, eos_token_id=WORDS + 1)
    write(folder, "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "add_bos_token": True, "chat_template": INST,
    })  # fmt: skip


Layout = Callable[[Vocabularies, Path], None]
LAYOUTS: Mapping[str, Layout] = {
    made.__name__: made
    for made in (
        hermes, hermes_not_legacy, hermes_json, older_json_with_decoder,
        older_json_with_added_tokens, named_only, llama2, llama1, phi3, gemma2,
        native_sentencepiece, native_tekken, tekken_with_template,
        sentencepiece_with_template, tekken_beside_wrong_json, nemo_json, llama3, qwen2,
        qwen2_pairs, smollm2, granite, smollm3,
    )
}  # fmt: skip
