"""`Sequence` with a scripted session: what it runs, and in which order."""

from collections.abc import Mapping

import numpy as np
import pytest

from graphs.spec import RingSpec
from runtime.backends.session import Caches, Ids, Logits, Slots
from runtime.decoding.ring import ContextFullError, Ring
from runtime.decoding.sequence import Sequence
from tests.support.make_checkpoint import tiny_spec

SLIDING = tiny_spec(window=4)  # with a chunk of 3: C = 6
PLAIN = tiny_spec()
RING = RingSpec(chunk=3, context=20)
SIZE = 8  # tokens of the script's vocabulary


class Script:
    """Notes every call. The logits after a token are its position plus 0, 1, 2, …"""

    partial = True

    def __init__(self, batch: int = 1) -> None:
        self.batch = batch
        self.calls: list[tuple[str, object]] = []
        self.arrays: list[tuple[Ids, Ids, Ids]] = []
        self.fails = False

    def resize(self, capacities: Mapping[int | None, int]) -> None:
        self.calls.append(("resize", *capacities.values()))

    def step(
        self, input_ids: Ids, position_ids: Ids, logits_indices: Ids, first: int = 0
    ) -> Logits:
        assert first == 0
        assert input_ids.shape == position_ids.shape
        assert all(
            array.dtype == np.int64 and array.flags.c_contiguous
            for array in (input_ids, position_ids, logits_indices)
        )
        if self.fails:
            raise KeyboardInterrupt
        self.calls.append(("step", input_ids.tolist(), position_ids[0].tolist()))
        self.arrays.append((input_ids, position_ids, logits_indices))
        wanted = np.take_along_axis(position_ids, logits_indices, axis=1)
        return (wanted[..., None] + np.arange(SIZE)).astype(np.float32)

    def read_row(self, row: int, slots: Slots) -> Caches:
        raise AssertionError("a sequence copies no rows")

    def write_row(self, row: int, slots: Slots, caches: Caches) -> None:
        raise AssertionError("a sequence copies no rows")


def test_the_session_gets_the_rings_capacities_at_once() -> None:
    script, ring = Script(), Ring(SLIDING, RING)
    Sequence(script, ring)
    assert script.calls == [("resize", *ring.capacities.values())]


def test_a_step_grows_the_ring_before_it_runs_and_advances_after() -> None:
    script, ring = Script(), Ring(SLIDING, RING)
    subject = Sequence(script, ring)
    subject.step([7, 8, 9])
    subject.step([10])
    subject.step([11])
    assert script.calls == [
        ("resize", 4),
        ("step", [[7, 8, 9]], [0, 1, 2]),
        ("step", [[10]], [3]),
        ("resize", 6),
        ("step", [[11]], [4]),
    ]
    assert subject.position == ring.positions[0] == 5


def test_a_step_that_fails_does_not_advance() -> None:
    script = Script()
    subject = Sequence(script, Ring(SLIDING, RING))
    subject.step([1])
    script.fails = True
    with pytest.raises(KeyboardInterrupt):
        subject.step([2])
    assert subject.position == 1


def test_logits_are_those_after_the_last_token_unless_others_are_wanted() -> None:
    subject = Sequence(Script(), Ring(SLIDING, RING))
    assert subject.step([1, 2, 3])[:, 0].tolist() == [2]
    assert subject.step([1, 2, 3], np.array([0, 2]))[:, 0].tolist() == [3, 5]


def test_one_token_steps_use_the_same_buffers() -> None:
    script = Script()
    subject = Sequence(script, Ring(SLIDING, RING))
    for token in range(9):
        subject.step([token])
    for name, arrays in zip(
        ("ids", "positions", "indices"), zip(*script.arrays, strict=True), strict=True
    ):
        assert len({id(array) for array in arrays}) == 1, name


def test_a_text_is_cut_at_the_chunk_and_at_the_rings_end() -> None:
    # W=4, chunk=3, C=6: from position 5 on, slot 5, then slots 0 to 2, then slot 3.
    script = Script()
    subject = Sequence(script, Ring(SLIDING, RING))
    subject.step([0, 0, 0])
    subject.step([0, 0])
    found = list(subject.feed(np.array([1, 2, 3, 4, 5])))
    assert [(piece.start, piece.length) for piece in found] == [(0, 1), (1, 3), (4, 1)]
    assert script.calls[-3:] == [
        ("step", [[1]], [5]),
        ("step", [[2, 3, 4]], [6, 7, 8]),
        ("step", [[5]], [9]),
    ]


@pytest.mark.parametrize(
    "wanted", [[], [0], [6], [1, 2, 3], [0, 1, 2, 3, 4, 5, 6], [0, 6]], ids=str
)
def test_wanted_logits_come_with_the_piece_that_reads_their_token(wanted: list[int]) -> None:
    script = Script()
    subject = Sequence(script, Ring(SLIDING, RING))
    found = []
    for piece in subject.feed(np.arange(7), np.array(wanted, np.int64)):
        inside = [i for i in wanted if piece.start <= i < piece.start + piece.length]
        assert piece.logits[:, 0].tolist() == inside
        found += inside
    assert found == wanted
    asked = [indices for _, _, indices in script.arrays]
    assert all(indices.size for indices in asked), "a step always returns something"


def test_only_the_last_piece_has_logits_if_nothing_is_wanted_by_index() -> None:
    pieces = list(Sequence(Script(), Ring(SLIDING, RING)).feed(np.arange(7)))
    assert [piece.logits[:, 0].tolist() for piece in pieces] == [[], [], [6]]


def test_no_token_is_no_step() -> None:
    script = Script()
    assert not list(Sequence(script, Ring(SLIDING, RING)).feed(np.zeros(0, np.int64)))
    assert [name for name, *_ in script.calls] == ["resize"]


def test_a_text_that_does_not_fit_is_refused_before_anything_is_read() -> None:
    script = Script()
    subject = Sequence(script, Ring(PLAIN, RING))
    with pytest.raises(ContextFullError, match="21 tokens"):
        next(subject.feed(np.zeros(21, np.int64)))
    assert [name for name, *_ in script.calls] == ["resize"]
    assert subject.position == 0


def test_further_rows_read_the_same_tokens_at_the_same_positions() -> None:
    script, ring = Script(batch=2), Ring(SLIDING, RING, rows=3)
    subject = Sequence(script, ring, rows=2)
    pieces = list(subject.feed(np.arange(4), np.arange(4)))
    assert [call for call in script.calls if call[0] == "step"] == [
        ("step", [[0, 1, 2]] * 2, [0, 1, 2]),
        ("step", [[3]] * 2, [3]),
    ]
    assert all((array[0] == array[1]).all() for step in script.arrays for array in step)
    assert [piece.logits.shape for piece in pieces] == [(3, SIZE), (1, SIZE)]
    assert ring.positions == [4, 0, 0], "positions are kept for the first row"
