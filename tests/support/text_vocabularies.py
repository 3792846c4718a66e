"""Two small vocabularies, trained on the texts of the tests, and GGUF files that hold them."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import gguf
import sentencepiece
import tokenizers
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from tests.support.strings import texts

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STRINGS = 320
PIECES = 900  # of the trained SentencePiece model
WORDS = 1500  # of the trained byte-level vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabularies:
    """Two small vocabularies: a SentencePiece model, and byte-level merges."""

    model: Path
    words: Mapping[str, int]
    merges: tuple[tuple[str, str], ...]


def train(folder: Path) -> Vocabularies:
    """Train both vocabularies on the texts that tests use."""
    corpus = folder / "corpus.txt"
    lines = (text.replace("\n", " ").replace("\0", "") for text in texts())
    corpus.write_text("\n".join(lines), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "tokenizer"), vocab_size=PIECES,
        character_coverage=0.98, byte_fallback=True, minloglevel=2, model_type="bpe",
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
    )  # fmt: skip
    words, merges = _byte_pairs()
    return Vocabularies(model=folder / "tokenizer.model", words=words, merges=merges)


@cache
def _byte_pairs() -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    """Merges that cross the borders of every rule of splitting, so that a wrong rule shows."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    pieces = [piece for text in texts() for piece in re.findall(r"(?s).{1,12}", text)]
    backend.train_from_iterator(pieces, trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], tuple(tuple(merge) for merge in model["merges"])


def plain() -> list[str]:
    """Texts in which no token of any layout is spelled, and that none of the programs refuses."""
    mark = re.compile(r"<[|/a-z]|\[/?[A-Z]|\0")
    return [text for text in texts() if not mark.search(text)][:STRINGS]


def byte_level(
    vocabularies: Vocabularies, split: str | None, special: tuple[str, ...], *, bos: bool = False
) -> tuple[tokenizers.Tokenizer, int]:
    """A tokenizer that splits by an expression, or as GPT-2 and digit by digit; and its size."""
    words = dict(vocabularies.words)
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=words, merges=list(vocabularies.merges), ignore_merges=bos)
    )
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    first = (
        pre_tokenizers.Digits(individual_digits=True)
        if split is None
        else pre_tokenizers.Split(tokenizers.Regex(split), "isolated")
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence([first, level])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in special])
    if bos:
        token = (special[0], backend.token_to_id(special[0]))
        backend.post_processor = processors.TemplateProcessing(
            single=f"{special[0]} $A", pair=f"{special[0]} $A $B", special_tokens=[token]
        )
    return backend, backend.get_vocab_size()


# GGUF

PRE_TOKENIZERS = (
    "llama-bpe", "tekken", "qwen2", "smollm", "gpt-2", "default", "gpt-4o", "refact", "dbrx",
)  # fmt: skip


def write_bpe_gguf(vocabularies: Vocabularies, path: Path, pre: str | None) -> None:
    """A byte-level GGUF with ChatML: `<|im_start|>` user-defined, as many files have it."""
    words = sorted(vocabularies.words, key=vocabularies.words.__getitem__)
    tokens = [*words, "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(words) + [3, 3, 4, 3])
    writer.add_token_merges([" ".join(merge) for merge in vocabularies.merges])
    writer.add_bos_token_id(len(words))
    writer.add_eos_token_id(len(words) + 1)
    writer.add_chat_template(CHATML)
    _close(writer)


def write_sentencepiece_gguf(vocabularies: Vocabularies, path: Path) -> None:
    """A SentencePiece GGUF whose ChatML tokens are user-defined, with `</s>` as the only end."""
    proto = ModelProto()
    proto.ParseFromString(vocabularies.model.read_bytes())
    marks = ["<|im_end|>", "<|im_start|>"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*(piece.piece for piece in proto.pieces), *marks])
    writer.add_token_scores([*(piece.score for piece in proto.pieces), -1000.0, -1000.0])
    writer.add_token_types([*(piece.type for piece in proto.pieces), 4, 4])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHATML)
    _close(writer)


def _close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
