"""Steps that a device would silently compute wrongly are refused before they reach it."""

from typing import Any

import numpy as np
import pytest

from graphs.errors import MistralcError
from graphs.spec import RingSpec
from runtime.backends.step_bounds import check_capacities, check_step
from tests.support.make_checkpoint import tiny_spec

SPEC = tiny_spec(vocab_size=64, window=4)
RING = RingSpec(chunk=3, context=1)  # six slots
FULL = tiny_spec(vocab_size=64)
CONTEXT = RingSpec(chunk=3, context=6)  # six positions in all


def step(
    first: int, count: int, *, spec: Any = SPEC, ring: RingSpec = RING, **changed: Any
) -> None:
    ids = np.zeros((1, count), np.int64)
    given = {"ids": ids, "positions": np.arange(first, first + count)[None], "indices": ids[:, :1]}
    given |= {name: np.asarray(value) for name, value in changed.items()}
    check_step(spec, ring, 1, **given)


@pytest.mark.parametrize(("first", "count"), [(0, 3), (3, 3), (4, 2), (5, 1), (6, 3), (605, 1)])
def test_a_step_that_stays_within_the_ring_passes(first: int, count: int):
    step(first, count)


@pytest.mark.parametrize(("first", "count"), [(4, 3), (5, 2), (11, 2), (604, 3)])
def test_a_step_across_the_rings_end_is_refused(first: int, count: int):
    with pytest.raises(MistralcError, match=rf"from position {first} on.* a ring that has 6"):
        step(first, count)


def test_the_ring_of_a_layer_without_a_window_must_not_wrap():
    step(3, 3, spec=FULL, ring=CONTEXT)
    with pytest.raises(MistralcError, match="a ring that has 6"):
        step(6, 1, spec=FULL, ring=CONTEXT)


def test_every_row_is_checked():
    positions = np.array([[0, 1], [5, 6]])
    ids = np.zeros((2, 2), np.int64)
    with pytest.raises(MistralcError, match="Row 1"):
        check_step(SPEC, RING, 2, ids, positions, ids[:, :1])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"ids": [[0, 64]]}, r"the token 64; 0 to 63"),
        ({"ids": [[-1, 0]]}, r"the token -1"),
        ({"indices": [[2]]}, r"the logits index 2; 0 to 1"),
        ({"indices": [[0, 0, 0, 0]]}, r"4 rows of logits; 1 to 3"),
        ({"positions": [[0, 2]]}, r"positions \[0, 2\]; consecutive"),
        ({"positions": [[-1, 0]]}, r"positions \[-1, 0\]; consecutive"),
        ({"positions": [[0, 1, 2]]}, r"positions \(1, 3\)"),
        ({"ids": [[0, 1], [0, 1]]}, r"tokens \(2, 2\)"),
    ],
)
def test_invalid_tokens_positions_and_indices_are_refused(changed: Any, words: str):
    with pytest.raises(MistralcError, match=words):
        step(0, 2, **changed)


def test_a_step_longer_than_a_chunk_is_refused():
    with pytest.raises(MistralcError, match=r"4 tokens .* 1 to 3 of each"):
        step(0, 4)


def test_only_the_full_capacities_are_accepted():
    check_capacities(SPEC, RING, {4: 6})
    with pytest.raises(MistralcError, match=r"ring of 3 slots .* has 6"):
        check_capacities(SPEC, RING, {4: 3})
