"""The strings and chats with which a bundle's tokenizer is compared. Knows no tokenizer.

The same on every host. None contains a control token: a user's message never becomes one here, and
other programs may read it as one.
"""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

Chat = Sequence[Mapping[str, Any]]

_TEXTS = (
    "The quick brown fox jumps over the lazy dog, doesn't it?",
    "I'll say we've got what they'd asked for: it's HERE, isn't it? YOU'RE RIGHT.",
    "def f(x: int = 0) -> dict[str, int]:\n    return {'a': x + 1, \"b\": x ** 2}  # ok\n",
    "for (int i = 0; i < n; ++i) {\n\tsum += a[i] * b[i];\n}\r\n\r\n",
    "3.14159 and 1,234,567.89; 0x7fff, 1e-5, 2026-11-28T18:59:21Z, room 101, 12345678",
    "camelCaseWord XMLHttpRequest snake_case_word SCREAMING_CASE kebab-case iPhone15Pro",
    "   leading, inner     and trailing spaces   ",
    "\n\n\nline\n\n  indented\n\t\ttabs\n \n",
    "https://example.org/path/to?q=a+b&c=%20#frag, user.name+tag@example.com",
    "Größe, naïve café, Łódź, İstanbul, façade, Ærøskøbing, Þórr, ΑΒΓ αβγ",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. ПРИВЕТМир",
    "今日は良い天気ですね。散歩に行きましょう！カタカナも、漢字も。",
    "我能吞下玻璃而不伤身体。機器學習模型的參數量很大。𠮷野家",
    "한국어 문장도 토큰으로 나뉩니다. 각각의 음절은?",
    "مرحبا بالعالم، كيف حالك؟ ١٢٣٤٥ اللُّغَةُ العَرَبِيَّة",
    "שלום עולם! מה שלומך? זה ניסוי.",
    "नमस्ते दुनिया। यह एक परीक्षण है। क्षत्रिय १२३",
    "สวัสดีชาวโลก นี่คือการทดสอบ ๑๒๓",
    "e\u0301 u\u0308 n\u0303 a\u0300\u0316 \u1100\u1161\u11a8 ﬁne ﬂow Ⅳ ½ ² ㎏",
    "👍🏿 👩\u200d👧\u200d👦 🏳️\u200d🌈 🇫🇷🇩🇪 1️⃣ ☺ ❤️\u200d🔥",
    "a\u00a0b\u3000c\u2003d\u200be\ufefff\u2028g\u0085h",
    "$100 < €90 + £80 ≥ ¥7 ± 5% ~ x^2 | y & z = {…} «quoted» “so” ‘too’ — – -",
    "=== ---- **** ____ //// ##### !!!??? ...... <<>> [[ ]] (( )) {{ }}",
    "| a | b |\n| --- | ---: |\n| `x` | **1** |\n\n- item\n  1. sub\n",
    "aaaaaaaaaaaaaaaaaaaa bbbbbbbbbbb ababababab lllllIIIIIl",
    '{"key": [1, 2.5, null, true], "text": "line\\nbreak", "nested": {"a": {}}}',
    "<html><body class='x'>&nbsp;<br/></body></html> <!-- note -->",
    "Sehr geehrte Damen und Herren,\n\nvielen Dank für Ihre Nachricht vom 3. März.",
    "SELECT name, COUNT(*) FROM t WHERE x <> 'it''s' GROUP BY 1 ORDER BY 2 DESC;",
    "\t \t mixed \t white \n space \r\n of all \x0b kinds \x0c",
)


def strings() -> tuple[str, ...]:
    """300 strings: texts in ten scripts, code, numbers, spaces, and pieces of them."""
    found: dict[str, None] = {}
    for text in _TEXTS:
        third = len(text) // 3
        for variant in (
            text, f" {text}", f"{text} ", f"\n{text}", text[third:], text[: 2 * third],
            text[third : 2 * third].strip(), text.upper(), text * 2, text[::-1],
            text.replace(" ", ""),
        ):  # fmt: skip
            found.setdefault(variant)
    return tuple(islice(found, 300))


def chats() -> tuple[Chat, ...]:
    """30 chats of one to four messages: 20 without a system message, 10 with one."""
    made: list[Chat] = []
    for i in range(20):
        first, second, third = (_TEXTS[(3 * i + k) % len(_TEXTS)].strip() for k in range(3))
        if i >= 10:
            first, second, third = f"{first.upper()} ({i})", third, second
        made.append(_chat(first, *([second, third] if i % 2 else [])))
        if i % 2:
            system = {"role": "system", "content": f"You are a helpful assistant. {i}"}
            turns = [first, f"{second}\n", f"  {third}"] if i % 3 else [f" {first} "]
            made.append([system, *_chat(*turns)])
    return tuple(made)


def _chat(*contents: str) -> Chat:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
