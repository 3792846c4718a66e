"""Fuzz session files: restore them as `--session` does and continue on a real model."""

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
from runtime.cli.session_file import resume, save
from runtime.completion import Limits
from runtime.decoding.sampling import SamplingParams
from runtime.decoding.snapshot import DIGEST, MAGIC
from runtime.load import Loaded, load
from tests.reliability.harness.damage import Draw, damaged_bytes, damaged_json
from tests.reliability.harness.target import Folder, Prepared, Target
from tests.reliability.harness.tiny_bundle import tiny_bundle

NAME = "session"
HEADER_START = len(MAGIC) + 4  # bytes
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello é"}]
GREEDY = SamplingParams(temperature=0)
NEW_TOKENS = 3  # generated after a snapshot has been restored


@cache
def _loaded() -> Loaded:
    return load(tiny_bundle(), threads=1)


def _write(folder: Path) -> bytes:
    """Write the session of a chat of 30 tokens; the ring of the windowed layer has wrapped."""
    loaded = _loaded()
    _clear()
    loaded.generator.feed([5 + i % 40 for i in range(30)])
    save(folder / NAME, loaded, {"messages": MESSAGES})
    return (folder / NAME).read_bytes()


def _damaged(folder: Path) -> Prepared:
    """Every change must be refused."""
    data = _write(folder)
    cases = damaged_bytes(data, _places(data)).filter(lambda it: it != data)

    def read(path: Path) -> None:
        resume(path / NAME, _loaded())
        raise AssertionError("a changed snapshot was accepted")

    return Prepared(
        cases=cases.map(lambda it: {NAME: it}), read=Folder(folder).reader(read), good=None
    )


def _resealed(folder: Path) -> Prepared:
    """The SHA-256 is recomputed, so the reader must validate the contents."""
    data = _write(folder)
    places = _places(data)
    (length,) = struct.unpack_from("<I", data, len(MAGIC))
    header = json.loads(data[HEADER_START : HEADER_START + length])
    rest = data[HEADER_START + length : -DIGEST]

    @st.composite
    def cases(draw: Draw) -> Mapping[str, bytes]:
        if draw(st.booleans()):
            return {NAME: _sealed(draw(damaged_bytes(data[:-DIGEST], places)))}
        text = draw(damaged_json(header) | _other_sizes(header))
        body = draw(st.just(rest) | damaged_bytes(rest))
        return {NAME: _sealed(MAGIC + struct.pack("<I", len(text)) + text + body)}

    return Prepared(cases=cases(), read=Folder(folder).reader(_restore_and_continue))


def _places(data: bytes) -> list[tuple[int, int]]:
    """The places of numbers: the header length, the tokens, and part of the caches."""
    (length,) = struct.unpack_from("<I", data, len(MAGIC))
    return [(len(MAGIC), 4), *((HEADER_START + length + 4 * i, 4) for i in range(40))]


def _other_sizes(header: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """Headers whose counts may contradict each other."""
    tokens = st.sampled_from((0, 1, 29, 30, 31, 96, 97, -1))
    written = st.sampled_from((0, 8, 15, 16, 29, 30, 31, 32, 96, 2**31, 2**63, 2**70))
    return st.tuples(tokens, written).map(
        lambda it: json.dumps(header | {"tokens": it[0], "written": it[1]}).encode()
    )


def _sealed(body: bytes) -> bytes:
    return body + hashlib.sha256(body).digest()


def _restore_and_continue(folder: Path) -> None:
    """Restore the sequence and continue it, as `generate` and `chat` do."""
    _clear()
    loaded = _loaded()
    generator = loaded.generator
    note = resume(folder / NAME, loaded)
    assert len(generator.tokens) == generator.position <= generator.ring.written[0]
    assert all(0 <= token < generator.vocab_size for token in generator.tokens)
    assert json.loads(json.dumps(note)) == note
    chat = Chat(loaded, GREEDY, Limits(max_new_tokens=NEW_TOKENS), None)
    chat.resume(note.get("messages", []))
    assert all(isinstance(message["content"], str) for message in chat.messages)
    assert all(0 <= i < generator.vocab_size for i in loaded.tokenizer.encode_chat(chat.messages))
    logits = generator.feed_from_common_prefix([*generator.tokens, 7])
    found = list(generator.generate(logits, GREEDY, max_new_tokens=NEW_TOKENS))
    assert all(0 <= one.token_id < generator.vocab_size for one in found)


def _clear() -> None:
    """Zero the caches: NaN keys of the last case would poison every later sequence."""
    generator = _loaded().generator
    generator.rewind(0)
    slots = {size: slice(0, capacity) for size, capacity in generator.ring.capacities.items()}
    kept = generator.session.read_row(0, slots)
    generator.session.write_row(0, slots, [np.zeros_like(cache) for cache in kept])


TARGETS = (
    Target(name="snapshot", prepare=_damaged, examples=60),
    Target(name="snapshot, SHA-256 recomputed", prepare=_resealed, examples=100),
)
