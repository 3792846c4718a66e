"""Snapshots of rows: a restored sequence continues bit-identically, and damage is refused."""

import json
import os
import random
import struct
from array import array
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from graphs.errors import MistralcError
from graphs.manifest import Manifest
from graphs.spec import ModelSpec, RingSpec
from runtime.backends.session import Session
from runtime.decoding import snapshot
from runtime.decoding.ring import Ring
from runtime.decoding.snapshot import Snapshot
from tests.conftest import Command
from tests.support import tiny
from tests.support.make_checkpoint import tiny_spec

ROWS = 3
RING = RingSpec(chunk=8, context=48, max_batch=ROWS)
# The ring of window 12 has 24 slots: a text of 38 has wrapped it.
SPECS = {
    "unwindowed": tiny_spec(vocab_size=64),
    "windowed": tiny_spec(vocab_size=64, window=12),
    "both": tiny_spec(vocab_size=64, layer_windows=(12, None)),
}
LENGTHS = (1, 7, 24, 38)


def manifest(spec: ModelSpec, **fields: str) -> Manifest:
    values = {"target": "cpu", "precision": "fp32"} | fields
    return Manifest(
        **values, activation="float32", model=spec, ring=RING, window_source="user",
        checkpoint={}, versions={}, files={},
    )  # type: ignore[arg-type]  # fmt: skip


@cache
def session(spec: ModelSpec) -> Session:
    return tiny.load(tiny.model_bytes(spec, "cpu"), spec, ROWS)


class Text:
    """A row of a session and its tokens."""

    def __init__(self, session: Session, ring: Ring, row: int) -> None:
        self.session, self.ring, self.row = session, ring, row
        self.tokens = array("i")
        session.resize(ring.capacities)

    def feed(self, count: int, seed: int = 0) -> np.ndarray:
        """Write random tokens; returns the logits after each piece."""
        ids = np.random.default_rng(seed).integers(0, 64, count)
        found, done = [], 0
        for piece in list(self.ring.pieces(count, self.row)):
            if self.ring.grow(piece, self.row):
                self.session.resize(self.ring.capacities)
            here = self.ring.positions[self.row]
            positions = np.arange(here, here + piece)[None]
            step = ids[None, done : done + piece].copy()
            last = np.array([[piece - 1]])
            found.append(self.session.step(step, positions, last, self.row)[0, 0].copy())
            self.ring.advance(piece, self.row)
            self.tokens.extend(step[0].tolist())
            done += piece
        return np.stack(found)

    def take(self, of: Manifest, **note: object) -> Snapshot:
        return snapshot.take(
            self.session, self.ring, self.tokens, of, row=self.row, note=dict(note)
        )


def text(spec: ModelSpec, row: int = 0) -> Text:
    return Text(session(spec), Ring(spec, RING, ROWS), row)


@pytest.fixture
def kept(tmp_path: Path) -> tuple[Path, Manifest]:
    """A file with a snapshot of 30 tokens, and its manifest."""
    spec = SPECS["windowed"]
    subject, of = text(spec), manifest(spec)
    subject.feed(30)
    snapshot.save(subject.take(of, messages=["hello"]), path := tmp_path / "kept.ring")
    return path, of


# Continuing


@pytest.mark.parametrize("through_a_file", [False, True], ids=["memory", "file"])
@pytest.mark.parametrize("count", LENGTHS)
@pytest.mark.parametrize("name", SPECS)
def test_a_restored_row_continues_bit_identically(
    name: str, count: int, through_a_file: bool, tmp_path: Path
):
    spec = SPECS[name]
    subject, of = text(spec, row=0), manifest(spec)
    subject.feed(count)
    taken = subject.take(of)
    if through_a_file:
        snapshot.save(taken, tmp_path / "row")
        taken = snapshot.load(tmp_path / "row", of)
    expected = np.concatenate([subject.feed(8, 1), subject.feed(1, 2)])
    other = text(spec, row=2)
    other.feed(33, seed=9)  # other tokens in the row before
    beside = Text(other.session, other.ring, 1)
    beside.feed(5, seed=8)
    snapshot.restore(taken, other.session, other.ring, of, row=2)
    other.tokens = taken.tokens
    assert other.ring.positions == [0, 5, count]
    assert other.ring.oldest_rewind(2) == text_rewind(spec, count)
    assert np.array_equal(np.concatenate([other.feed(8, 1), other.feed(1, 2)]), expected)
    continued = beside.feed(1, 3)
    alone = text(spec, row=1)
    alone.feed(5, seed=8)
    assert np.array_equal(continued, alone.feed(1, 3)), "the neighbouring row must not change"


def text_rewind(spec: ModelSpec, count: int) -> int:
    ring = Ring(spec, RING)
    ring.advance(count)
    return ring.oldest_rewind()


def test_a_rewound_row_keeps_its_rewind_limit():
    spec = SPECS["windowed"]
    subject, of = text(spec), manifest(spec)
    subject.feed(40)
    subject.ring.rewind(35)
    del subject.tokens[35:]
    taken = subject.take(of)
    expected = subject.feed(4, 1)
    other = text(spec, row=1)
    snapshot.restore(taken, other.session, other.ring, of, row=1)
    assert (other.ring.positions[1], other.ring.written[1]) == (35, 40)
    assert np.array_equal(other.feed(4, 1), expected)


def test_the_size_of_a_snapshot_is_that_of_the_filled_slots():
    spec = SPECS["windowed"]
    subject, of = text(spec), manifest(spec)
    per_slot = of.contract.token_bytes
    subject.feed(10)
    assert subject.take(of).nbytes == 10 * (per_slot + 4)
    subject.feed(36)
    assert subject.take(of).nbytes == 24 * per_slot + 46 * 4


def test_tokens_that_do_not_match_the_row_are_refused():
    subject = text(SPECS["windowed"])
    subject.feed(10)
    with pytest.raises(MistralcError, match="3 tokens were given for a row that holds 10"):
        snapshot.take(subject.session, subject.ring, [1, 2, 3], manifest(SPECS["windowed"]))


# Files


def test_a_file_restores_the_snapshot(kept: tuple[Path, Manifest]):
    path, of = kept
    found = snapshot.load(path, of)
    subject = text(of.model)
    subject.feed(30)
    expected = subject.take(of, messages=["hello"])
    assert (found.tokens, found.written, found.note) == (
        expected.tokens, expected.written, {"messages": ["hello"]},
    )  # fmt: skip
    assert all(map(np.array_equal, found.caches, expected.caches))


def test_one_flipped_bit_anywhere_is_always_refused(kept: tuple[Path, Manifest]):
    path, of = kept
    whole = path.read_bytes()
    draw = random.Random(0)  # noqa: S311
    ends = [0, 8 * len(whole) - 1]
    for bit in (*ends, *(draw.randrange(8 * len(whole)) for _ in range(200))):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(MistralcError, match=r"damaged|not a snapshot"):
            snapshot.load(path, of)


def test_a_truncated_or_extended_file_is_refused(kept: tuple[Path, Manifest]):
    path, of = kept
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 11, 12, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(MistralcError, match=r"damaged|not a snapshot"):
            snapshot.load(path, of)
    path.write_bytes(whole + b"\0")
    with pytest.raises(MistralcError, match="damaged"):
        snapshot.load(path, of)


def signed(body: bytes) -> bytes:
    return body + sha256(body).digest()


def with_header(**fields: object) -> Callable[[bytes], bytes]:
    """Change fields of the header and recompute the SHA-256."""

    def change(whole: bytes) -> bytes:
        (length,) = struct.unpack_from("<I", whole, 8)
        header = json.loads(whole[12 : 12 + length]) | fields
        text = json.dumps(header).encode()
        return signed(whole[:8] + struct.pack("<I", len(text)) + text + whole[12 + length : -32])

    return change


def with_tokens(token: int) -> Callable[[bytes], bytes]:
    """Replace the last token and recompute the SHA-256."""

    def change(whole: bytes) -> bytes:
        (length,) = struct.unpack_from("<I", whole, 8)
        at = 12 + length + 4 * 29
        return signed(whole[:at] + struct.pack("<i", token) + whole[at + 4 : -32])

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_header(format=2), "format 2 and this mistralc reads format 1"),
        (with_header(bundle="0" * 64), "another bundle"),
        (with_header(tokens=10**9), "not a snapshot"),
        (with_header(tokens=-1), "not a snapshot"),
        (with_header(tokens="all"), "not a snapshot"),
        (with_header(written=23), "not a snapshot"),
        (with_header(written=29), "not what this bundle's ring holds"),
        (with_header(written=-5), "not a snapshot"),
        (with_header(written=44), "not what this bundle's ring holds"),  # rewound beyond the limit
        (with_header(tokens=2**70), "not a snapshot"),
        (with_header(tokens=True), "tokens is True; a JSON int is expected"),
        (with_header(bundle=5), "bundle is 5; a JSON str is expected"),
        (with_header(note=[]), "note is .*; a JSON dict is expected"),
        (with_tokens(64), "not what this bundle's ring holds"),
        (with_tokens(-1), "not what this bundle's ring holds"),
        (
            lambda whole: signed(whole[:8] + struct.pack("<I", 9000) + b"[" * 9000),
            "not a snapshot",
        ),
        (lambda whole: signed(whole[:8] + b"\xff\xff\xff\xff" + whole[12:-32]), "not a snapshot"),
        (lambda whole: signed(whole[:8] + struct.pack("<I", 2) + b"[]"), "not a snapshot"),
        (lambda whole: signed(b"MCLCRING"), "damaged"),
    ],
)
def test_invalid_contents_with_a_correct_hash_are_refused(
    kept: tuple[Path, Manifest], change: Callable[[bytes], bytes], message: str
):
    path, of = kept
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(MistralcError, match=message):
        snapshot.load(path, of)


def test_a_snapshot_of_another_bundle_is_refused_and_changes_nothing(kept: tuple[Path, Manifest]):
    path, of = kept
    foreign = manifest(of.model, precision="int8")
    with pytest.raises(MistralcError, match="another bundle"):
        snapshot.load(path, foreign)
    taken = snapshot.load(path, of)
    subject = text(of.model)
    subject.feed(5)
    before = subject.take(of)
    with pytest.raises(MistralcError, match="another bundle"):
        snapshot.restore(taken, subject.session, subject.ring, foreign)
    wrong = replace(taken, caches=taken.caches[1:])
    with pytest.raises(MistralcError, match="not what this bundle's ring holds"):
        snapshot.restore(wrong, subject.session, subject.ring, of)
    after = subject.take(of)
    assert (before.tokens, before.written) == (after.tokens, after.written)
    assert all(map(np.array_equal, before.caches, after.caches))


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(
    kept: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
):
    path, of = kept
    whole, taken = path.read_bytes(), snapshot.load(path, of)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MistralcError, match="No space left"):
        snapshot.save(taken, path)
    assert path.read_bytes() == whole
    assert list(path.parent.iterdir()) == [path]


def test_only_the_user_can_read_a_snapshot_file(kept: tuple[Path, Manifest]):
    assert kept[0].stat().st_mode & 0o077 == 0


# Commands


def test_generate_prefills_a_long_prompt_once(
    mistralc: Command, plain_bundle: Path, tmp_path: Path
):
    def run(prompt: str, *more: object) -> dict[str, object]:
        ended = mistralc("generate", plain_bundle, prompt, "-n", 4, "-t", 0, "--json", *more)
        assert ended.code == 0, ended.err
        return json.loads(ended.out)  # type: ignore[no-any-return]

    kept = tmp_path / "long.ring"
    long = "a long beginning that many share"
    first = run(long, "--session", kept)
    again, other = run(long, "--session", kept), run(long + "!", "--session", kept)
    assert first["timings"]["cached_tokens"] == 0  # type: ignore[index]
    count = first["timings"]["prompt_tokens"]  # type: ignore[index]
    assert again["timings"]["cached_tokens"] == count - 1  # type: ignore[index]
    assert other["timings"]["cached_tokens"] == count  # type: ignore[index]
    assert again["tokens"] == first["tokens"] == run(long)["tokens"]


def test_a_chat_continues_from_its_session_file(
    mistralc: Command, plain_bundle: Path, tmp_path: Path
):
    kept = tmp_path / "chat.ring"
    options = ("chat", plain_bundle, "-n", 3, "-t", 0)
    first = mistralc(*options, "--session", kept, stdin=b"hello\n")
    resumed = mistralc(*options, "--session", kept, stdin=b"more\n/stats\n")
    whole = mistralc(*options, stdin=b"hello\nmore\n/stats\n")
    assert (first.code, resumed.code) == (0, 0), first.err + resumed.err
    answers = [ended.out.split("\nprompt_tokens")[0] for ended in (resumed, whole)]
    assert first.out + answers[0] == answers[1]
    cached = [line for line in resumed.out.splitlines() if line.startswith("cached_tokens")]
    assert cached[0].split() != ["cached_tokens", "0"]
    assert cached == [line for line in whole.out.splitlines() if line.startswith("cached_tokens")]


def test_a_damaged_or_foreign_session_file_is_refused_and_not_changed(
    mistralc: Command, plain_bundle: Path, sliding_bundle: Path, tmp_path: Path
):
    kept = tmp_path / "chat.ring"
    mistralc("chat", plain_bundle, "-n", 3, "--session", kept, stdin=b"hello\n")
    whole = kept.read_bytes()
    foreign = mistralc("chat", sliding_bundle, "--session", kept, stdin=b"hello\n")
    assert (foreign.code, kept.read_bytes()) == (1, whole)
    assert "another bundle" in foreign.err
    kept.write_bytes(whole[:-1])
    damaged = mistralc("generate", plain_bundle, "x", "--session", kept)
    assert (damaged.code, kept.read_bytes()) == (1, whole[:-1])
    assert "is damaged" in damaged.err
    kept.write_bytes(with_header(note={"messages": "hello"})(whole))
    no_chat = mistralc("chat", plain_bundle, "--session", kept, stdin=b"hello\n")
    assert (no_chat.code, "expected the messages of a chat" in no_chat.err) == (1, True)


def test_a_different_system_message_is_a_usage_error(
    mistralc: Command, plain_bundle: Path, tmp_path: Path
):
    kept = tmp_path / "chat.ring"
    options = ("chat", plain_bundle, "-n", 3, "--session", kept)
    assert mistralc(*options, "--system", "be brief", stdin=b"hello\n").code == 0
    assert mistralc(*options, "--system", "be brief", stdin=b"/undo\n").code == 0
    ended = mistralc(*options, "--system", "be long", stdin=b"hello\n")
    assert (ended.code, "--system differs from" in ended.err) == (2, True)


def test_an_unwritable_session_file_is_refused_before_the_chat(
    mistralc: Command, plain_bundle: Path, tmp_path: Path
):
    ended = mistralc("chat", plain_bundle, "--session", tmp_path / "no" / "x", stdin=b"hello\n")
    assert (ended.code, ended.out) == (2, "")
    assert "expected a file in a directory that exists" in ended.err
