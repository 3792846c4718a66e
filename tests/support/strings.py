"""2,000 texts for testing tokenizers, the same on every run."""

import random
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics

COUNT = 2000

_SCRIPTS = (
    "今日は良い天気ですね。散歩に行きましょう！カタカナも、漢字も。",
    "我能吞下玻璃而不伤身体。機器學習模型的參數量很大。𠮷野家",
    "한국어 문장도 토큰으로 나뉩니다. 각각의 음절은?",
    "مرحبا بالعالم، كيف حالك؟ ١٢٣٤٥ اللُّغَةُ العَرَبِيَّة",
    "שלום עולם! מה שלומך? זה ניסוי.",
    "नमस्ते दुनिया। यह एक परीक्षण है। क्षत्रिय",
    "สวัสดีชาวโลก นี่คือการทดสอบ",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "Zażółć gęślą jaźń; Größe, naïve, Ærøskøbing, İstanbul ığüşöç",
    "e\u0301 u\u0308 n\u0303 \u1100\u1161\u11a8 a\u0300\u0316\u0334",
)
_EMOJI = (
    "🤷🏽\u200d♀️",
    "👨\u200d👩\u200d👧\u200d👦",
    "🏳️\u200d🌈",
    "🇫🇷🇩🇪",
    "👍🏿",
    "1️⃣",
    "☺",
    "❤️\u200d🔥",
    "🧑🏻\u200d🚀",
)
_MARKS = (
    "[INST]", "[/INST]", "<s>", "</s>", "<unk>", "<0x41>", "<0xFF>", "[control_8]", "<|im_start|>",
    "<|im_end|>", "<SPECIAL_20>", "[SYSTEM_PROMPT]", "<pad>", "[REFERENCE_DOC_3]", "[REF]", "[IMG]",
    "▁", "Ġ", "\ufeff", "\u200b", "\u00a0", "\u3000", "\u2028", "\u0085",
)  # fmt: skip
_EDGES = (
    "", " ", "  ", "\n", "\t", "\0", "\0\0a\0", "a", " a", "a ", " a ", "\r\n", "\n\n\n", "a\nb",
    " " * 3, " " * 17, " " * 100, "\n" * 33, "\t" * 9, "a" * 99, "ab" * 50, "=" * 80,
    "x" + " " * 64,
)  # fmt: skip


@cache
def texts() -> tuple[str, ...]:
    """Prose, code, scripts, emoji, control characters, spaces of all kinds, bytes, and mixes."""
    draw = random.Random(20261121)  # noqa: S311  (the same on every run)
    sources = [
        iter(_EDGES), _prose(draw), _code(draw), _scripts(draw), _emoji(draw), _control(draw),
        _spaces(draw), _code_points(draw), _bytes(draw), _marked(draw),
    ]  # fmt: skip
    return tuple(islice(_round_robin(sources), COUNT))


def _round_robin(sources: list[Iterator[str]]) -> Iterator[str]:
    while True:
        for source in list(sources):
            text = next(source, None)
            if text is None:
                sources.remove(source)
            else:
                yield text


def _cut(draw: random.Random, text: str, longest: int) -> str:
    start = draw.randrange(len(text))
    return text[start : start + draw.randint(1, longest)]


def _prose(draw: random.Random) -> Iterator[str]:
    text = "".join(topics.values())
    while True:
        yield _cut(draw, text, 400)


def _code(draw: random.Random) -> Iterator[str]:
    text = Path(random.__file__).read_text(encoding="utf-8")
    while True:
        yield _cut(draw, text, 300)


def _scripts(draw: random.Random) -> Iterator[str]:
    yield from _SCRIPTS
    while True:
        yield " ".join(_cut(draw, draw.choice(_SCRIPTS), 30) for _ in range(draw.randint(1, 4)))


def _emoji(draw: random.Random) -> Iterator[str]:
    yield from _EMOJI
    while True:
        yield draw.choice(("", " ", "a", "\n")).join(draw.choices(_EMOJI, k=draw.randint(1, 6)))


def _control(draw: random.Random) -> Iterator[str]:
    characters = [chr(i) for i in (*range(0x20), *range(0x7F, 0xA0))]
    while True:
        yield draw.choice(("", "x")).join(draw.choices(characters, k=draw.randint(1, 12)))


def _spaces(draw: random.Random) -> Iterator[str]:
    while True:
        runs = draw.choices(
            (" ", " ", "\n", "\t", "\r\n", "a", "1", ".", " b"), k=draw.randint(2, 8)
        )
        yield "".join(run * draw.randint(1, 40) if run.isspace() else run for run in runs)


def _code_points(draw: random.Random) -> Iterator[str]:
    """Mostly unassigned or rare characters, which a vocabulary has only as bytes."""
    while True:
        points = (draw.randrange(0x10F800) for _ in range(draw.randint(1, 8)))
        yield "".join(chr(p + 0x800 if p >= 0xD800 else p) for p in points)


def _bytes(draw: random.Random) -> Iterator[str]:
    while True:
        data = draw.randbytes(draw.randint(1, 24))
        yield data.decode(draw.choice(("latin-1", "utf-8")), errors="replace")


def _marked(draw: random.Random) -> Iterator[str]:
    """Text that contains spellings of control tokens and byte pieces."""
    yield from (mark for mark in _MARKS if not mark.startswith("[REF"))
    while True:
        parts = (draw.choice((draw.choice(_MARKS), "word", " two words ")) for _ in range(4))
        yield draw.choice((" ", "x")) + draw.choice(("", " ", "\n")).join(parts)
