"""Fuzzing the file of a session: what `--session` brings back. The model that goes on is real."""

import hashlib
import json
import struct
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from runtime.cli.chat import Chat
from runtime.cli.session_file import keep, resume
from runtime.completion import Limits
from runtime.decoding.sampling import SamplingParams
from runtime.decoding.snapshot import DIGEST, MAGIC
from runtime.load import Loaded, load
from tests.reliability import exported
from tests.reliability.damage import Draw, damaged_bytes, damaged_json
from tests.reliability.target import Folder, Prepared, Target

NAME = "session"
BEGIN = len(MAGIC) + 4  # where the header begins
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello é"}]
GREEDY = SamplingParams(temperature=0)
MORE = 3  # tokens with which a text that was brought back goes on


@cache
def _loaded() -> Loaded:
    return load(exported.bundle(), threads=1)


def _write(folder: Path) -> bytes:
    """A chat of 30 tokens; the ring of the layer that slides has wrapped."""
    loaded = _loaded()
    _clear()
    loaded.generator.feed([5 + i % 40 for i in range(30)])
    keep(folder / NAME, loaded, {"messages": MESSAGES})
    return (folder / NAME).read_bytes()


def _damaged(folder: Path) -> Prepared:
    """Any change has to be refused: there is nothing to allow."""
    data = _write(folder)
    cases = damaged_bytes(data, _places(data)).filter(lambda it: it != data)

    def read(path: Path) -> None:
        resume(path / NAME, _loaded())
        raise AssertionError("a changed snapshot was let through")

    return Prepared(
        cases=cases.map(lambda it: {NAME: it}), read=Folder(folder).reading(read), good=None
    )


def _forged(folder: Path) -> Prepared:
    """The SHA-256 is made right again, so what is inside has to be looked at."""
    data = _write(folder)
    places = _places(data)
    (length,) = struct.unpack_from("<I", data, len(MAGIC))
    header = json.loads(data[BEGIN : BEGIN + length])
    rest = data[BEGIN + length : -DIGEST]

    @st.composite
    def cases(draw: Draw) -> Mapping[str, bytes]:
        if draw(st.booleans()):
            return {NAME: _sealed(draw(damaged_bytes(data[:-DIGEST], places)))}
        text = draw(damaged_json(header) | _other_sizes(header))
        body = draw(st.just(rest) | damaged_bytes(rest))
        return {NAME: _sealed(MAGIC + struct.pack("<I", len(text)) + text + body)}

    return Prepared(cases=cases(), read=Folder(folder).reading(_go_on))


def _places(data: bytes) -> list[tuple[int, int]]:
    """Where numbers lie: the header's length, the tokens, and some of the caches."""
    (length,) = struct.unpack_from("<I", data, len(MAGIC))
    return [(len(MAGIC), 4), *((BEGIN + length + 4 * i, 4) for i in range(40))]


def _other_sizes(header: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """A header whose counts may or may not fit each other."""
    tokens = st.sampled_from((0, 1, 29, 30, 31, 96, 97, -1))
    written = st.sampled_from((0, 8, 15, 16, 29, 30, 31, 32, 96, 2**31, 2**63, 2**70))
    return st.tuples(tokens, written).map(
        lambda it: json.dumps(header | {"tokens": it[0], "written": it[1]}).encode()
    )


def _sealed(body: bytes) -> bytes:
    return body + hashlib.sha256(body).digest()


def _go_on(folder: Path) -> None:
    """Bring the text back and go on with it, as `generate` and `chat` do."""
    _clear()
    loaded = _loaded()
    generator = loaded.generator
    note = resume(folder / NAME, loaded)
    assert len(generator.tokens) == generator.position <= generator.ring.written[0]
    assert all(0 <= token < generator.vocab_size for token in generator.tokens)
    assert json.loads(json.dumps(note)) == note
    chat = Chat(loaded, GREEDY, Limits(max_new_tokens=MORE), None)
    chat.resume(note.get("messages", []))
    assert all(isinstance(message["content"], str) for message in chat.messages)
    assert all(0 <= i < generator.vocab_size for i in loaded.tokenizer.encode_chat(chat.messages))
    logits = generator.feed_from_common_prefix([*generator.tokens, 7])
    found = list(generator.generate(logits, GREEDY, max_new_tokens=MORE))
    assert all(0 <= one.token_id < generator.vocab_size for one in found)


def _clear() -> None:
    """Forget the last case: keys that are no numbers would spoil every text after them."""
    generator = _loaded().generator
    generator.rewind(0)
    slots = {size: slice(0, capacity) for size, capacity in generator.ring.capacities.items()}
    kept = generator.session.read_row(0, slots)
    generator.session.write_row(0, slots, [np.zeros_like(cache) for cache in kept])


TARGETS = (
    Target(name="snapshot", prepare=_damaged, examples=60),
    Target(name="snapshot, SHA-256 made right", prepare=_forged, examples=100),
)
