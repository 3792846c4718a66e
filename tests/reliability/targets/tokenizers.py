"""Fuzz tokenizers in every format that a checkpoint or bundle may have."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from exporter.bundle.staging import write_tokenizer
from exporter.checkpoint.gguf_file import read_gguf
from exporter.tokenizer.chat_formats import CHAT_TEMPLATES
from exporter.tokenizer.read import read_tokenizer
from runtime.text.detokenizer import byte_characters
from runtime.text.tokenizer import Tokenizer
from tests.reliability.harness.damage import NUMBERS, Draw, damaged_bytes, damaged_json
from tests.reliability.harness.target import Files, Folder, Prepared, Target
from tests.reliability.targets.checkpoints import gguf_bytes
from tests.support.make_checkpoint import tiny_spec, write_checkpoint

TEXTS = ("", " a", "Hello, é [INST] </s> 你好\0")
CHAT = [{"role": "user", "content": "Hello [INST]"}, {"role": "assistant", "content": "Hi"}]
SETTINGS = ("tokenizer_config.json", "generation_config.json")
PIECES = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")


def use(tokenizer: Tokenizer) -> None:
    """Encode, decode and render a chat, as the commands do."""
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert all(type(i) is int and 0 <= i < 2**32 for i in ids)
        assert isinstance(tokenizer.decode(ids), str)
    stream = tokenizer.stream()
    assert isinstance("".join(map(stream.push, range(300))) + stream.flush(), str)
    assert all(type(i) is int for i in tokenizer.stop_ids)
    assert tokenizer.encode_chat(CHAT) is not None


def _convert(path: Path) -> None:
    """Read a checkpoint's tokenizer, write it as a bundle's, and use the result."""
    found = read_tokenizer(path)
    out = (path if path.is_dir() else path.parent) / "out"
    out.mkdir(exist_ok=True)
    write_tokenizer(found, out)
    use(Tokenizer.load(out))


def _huggingface(folder: Path) -> Prepared:
    path = write_checkpoint(folder / "model", tiny_spec(vocab_size=262, hidden_size=16))
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATES["v3"], encoding="utf-8")
    names = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}
    (path / "special_tokens_map.json").write_text(json.dumps(names), encoding="utf-8")
    beside = ("tokenizer.json", *SETTINGS, "config.json", "special_tokens_map.json")
    trees = {name: json.loads((path / name).read_bytes()) for name in beside}
    template = (path / "chat_template.jinja").read_bytes()

    @st.composite
    def cases(draw: Draw) -> Files:
        name = draw(st.sampled_from((*beside, "tokenizer.json", "chat_template.jinja")))
        if name in trees:
            return {name: draw(damaged_json(trees[name]))}
        return {name: draw(damaged_bytes(template))}

    return Prepared(cases=cases(), read=Folder(path).reader(_convert))


def _in_a_bundle(folder: Path) -> Prepared:
    source = write_checkpoint(folder / "model", tiny_spec(vocab_size=262, hidden_size=16))
    path = folder / "bundle"
    path.mkdir()
    write_tokenizer(read_tokenizer(source), path)
    trees = {name: json.loads((path / name).read_bytes()) for name in SETTINGS}
    cases = st.sampled_from(SETTINGS).flatmap(
        lambda name: damaged_json(trees[name]).map(lambda data: {name: data})
    )
    return Prepared(
        cases=cases, read=Folder(path).reader(lambda it: use(Tokenizer.load(it)))
    )  # fmt: skip


def _tekken(folder: Path) -> Prepared:
    words = [bytes([byte]) for byte in range(256)] + [b"ab", b"abc", "é".encode()]
    special = [{"rank": i, "token_str": text} for i, text in enumerate(PIECES)]
    tree = {
        "config": {"pattern": r"\p{L}+|\p{N}|\s+|[^\s\p{L}\p{N}]+", "version": "v7",
                   "default_vocab_size": len(words) + 8, "default_num_special_tokens": 8},
        "vocab": [{"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": None}
                  for rank, word in enumerate(words)],
        "special_tokens": special,
    }  # fmt: skip
    path = folder / "model"
    path.mkdir()
    (path / "tekken.json").write_text(json.dumps(tree), encoding="utf-8")
    cases = st.sampled_from(("config", "special_tokens", None)).flatmap(
        lambda part: damaged_json(tree if part is None else tree[part]).map(
            lambda data: {"tekken.json": data if part is None else _with(tree, part, data)}
        )
    )
    return Prepared(cases=cases, read=Folder(path).reader(_convert))


def _with(tree: dict[str, Any], part: str, data: bytes) -> bytes:
    """The document with `data`, valid JSON or not, in place of one part."""
    others = json.dumps({key: value for key, value in tree.items() if key != part}).encode()
    return others[:-1] + b", " + json.dumps(part).encode() + b": " + data + b"}"


def sentencepiece_model() -> ModelProto:
    proto = ModelProto()
    proto.trainer_spec.model_type = 2
    proto.trainer_spec.bos_id, proto.trainer_spec.eos_id = 1, 2
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3, "[INST]": 3, "[/INST]": 4}
    for text, kind in kinds.items():
        proto.pieces.add(piece=text, score=0.0, type=kind)
    for byte in range(256):
        proto.pieces.add(piece=f"<0x{byte:02X}>", score=0.0, type=6)
    for rank, text in enumerate(("\u2581", "a", "b", "ab", "\u2581a", "é")):
        proto.pieces.add(piece=text, score=-float(rank), type=1)
    return proto


def _sentencepiece(folder: Path) -> Prepared:
    path = folder / "model"
    path.mkdir()
    data = sentencepiece_model().SerializeToString()
    (path / "tokenizer.model.v3").write_bytes(data)
    scores = st.sampled_from((float("nan"), float("inf"), -float("inf"), 0.0, 3e38))
    ids = st.sampled_from((-(2**31), -1, 0, 266, 267, 2**31 - 1))

    @st.composite
    def edited(draw: Draw) -> bytes:
        proto = sentencepiece_model()
        for _ in range(draw(st.integers(1, 3))):
            piece = proto.pieces[draw(st.integers(0, len(proto.pieces) - 1))]
            match draw(st.integers(0, 4)):
                case 0:
                    piece.score = draw(scores)
                case 1:
                    piece.type = draw(st.integers(1, 6))
                case 2:
                    piece.piece = draw(
                        st.sampled_from(("", "a", "\u2581\u2581", "<0x41>", "x" * 999))
                    )
                case 3:
                    proto.trainer_spec.bos_id, proto.trainer_spec.eos_id = draw(ids), draw(ids)
                case _:
                    proto.normalizer_spec.add_dummy_prefix = draw(st.booleans())
                    proto.normalizer_spec.remove_extra_whitespaces = draw(st.booleans())
        return proto.SerializeToString()

    cases = (edited() | damaged_bytes(data)).map(lambda it: {"tokenizer.model.v3": it})
    return Prepared(cases=cases, read=Folder(path).reader(_convert))


def _gguf(kind: str) -> Callable[[Path], Prepared]:
    """A GGUF vocabulary; its metadata is edited as values, then as bytes."""
    pieces = list(sentencepiece_model().pieces)
    letters = [*PIECES[:3], *sorted(byte_characters().values()), "ab"]
    good: dict[str, Any] = {
        "general.architecture": "llama", "tokenizer.ggml.model": kind,
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 2, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": CHAT_TEMPLATES["v1"],
    }  # fmt: skip
    if kind == "llama":
        good |= {"tokenizer.ggml.tokens": [piece.piece for piece in pieces],
                 "tokenizer.ggml.scores": [piece.score for piece in pieces],
                 "tokenizer.ggml.token_type": [piece.type for piece in pieces],
                 "tokenizer.ggml.add_space_prefix": True}  # fmt: skip
    else:
        good |= {"tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": letters,
                 "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(letters) - 3),
                 "tokenizer.ggml.merges": ["a b"]}  # fmt: skip

    @st.composite
    def cases(draw: Draw) -> Files:
        metadata = dict(good)
        for _ in range(draw(st.integers(1, 2))):
            key = draw(st.sampled_from(sorted(good)))
            metadata[key] = draw(_value_like(good[key]))
        data = gguf_bytes(metadata)
        return {"model.gguf": draw(damaged_bytes(data)) if draw(st.booleans()) else data}

    def prepare(folder: Path) -> Prepared:
        path = folder / "model.gguf"
        path.write_bytes(gguf_bytes(good))
        assert read_gguf(path).metadata == good
        return Prepared(
            cases=cases(), read=Folder(folder).reader(lambda it: _convert(it / path.name))
        )

    return prepare


def _value_like(good: Any) -> st.SearchStrategy[Any]:
    """None (key left out), another type, or a list with one entry changed, repeated or removed."""
    others = st.sampled_from((None, "", "x", "\0", 0.5, float("nan"), True, [], ["x"], [1, 2],
                              [0.5], *NUMBERS))  # fmt: skip
    if not isinstance(good, list):
        return others
    same: tuple[Any, ...] = ("", "a", "a b c", "<s>") if isinstance(good[0], str) else NUMBERS
    if isinstance(good[0], float):
        same = (float("nan"), float("inf"), -1e300, 0.0)
    at = st.integers(0, len(good) - 1)
    replaced = st.tuples(at, st.sampled_from(same)).map(
        lambda it: [*good[: it[0]], it[1], *good[it[0] + 1 :]]
    )
    return others | replaced | at.map(lambda i: good[:i]) | at.map(lambda i: [*good, good[i]])


TARGETS = (
    Target(name="tokenizer.json and settings", prepare=_huggingface, examples=150),
    Target(name="a bundle's tokenizer settings", prepare=_in_a_bundle, examples=80),
    Target(name="tekken.json", prepare=_tekken, examples=80),
    Target(name="SentencePiece model", prepare=_sentencepiece, examples=80),
    Target(name="GGUF vocabulary, llama", prepare=_gguf("llama"), examples=60),
    Target(name="GGUF vocabulary, gpt2", prepare=_gguf("gpt2"), examples=60),
)
