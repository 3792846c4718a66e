"""Window and ring arithmetic: worked examples, then against a ring simulated as a dict."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from graphs import window

POSITIONS = st.integers(0, 200)
WINDOWS = st.none() | st.integers(1, 40)
CAPACITIES = st.integers(1, 60)


def ring_after(last: int, capacity: int) -> dict[int, int]:
    """Positions by slot after positions 0..last have been written one by one."""
    slots: dict[int, int] = {}
    for position in range(last + 1):
        slots[position % capacity] = position
    return slots


# The worked example of graphs/window.py: W=4, chunk=3, C=6


def test_after_positions_0_to_5_every_slot_holds_its_own_number():
    assert [window.slot_position(5, slot, 6) for slot in range(6)] == [0, 1, 2, 3, 4, 5]


def test_writing_6_7_8_overwrites_the_first_three_slots():
    assert [window.slot_position(8, slot, 6) for slot in range(6)] == [6, 7, 8, 3, 4, 5]


def test_slots_not_yet_written_are_negative():
    assert [window.slot_position(1, slot, 6) for slot in range(6)] == [0, 1, -4, -3, -2, -1]


@pytest.mark.parametrize(
    ("query", "keys"), [(6, [3, 4, 5, 6]), (7, [4, 5, 6, 7]), (8, [5, 6, 7, 8])]
)
def test_each_query_of_the_chunk_6_7_8_finds_its_four_keys(query: int, keys: list[int]):
    held = [window.slot_position(8, slot, 6) for slot in range(6)]
    assert sorted(k for k in held if window.visible(query, k, 4)) == keys


def test_seven_tokens_from_position_4_are_cut_into_2_3_2():
    assert list(window.pieces(4, 7, 3, [6])) == [2, 3, 2]


def test_a_window_of_4096_and_a_chunk_of_512_need_4608_slots():
    assert window.capacity(4, 3) == 6
    assert window.capacity(4096, 512) == 4608


def test_without_a_window_exactly_the_past_is_visible():
    assert [window.visible(3, k, None) for k in (-1, 0, 3, 4)] == [False, True, True, False]


# Against brute force


@given(last=POSITIONS, capacity=CAPACITIES)
def test_slot_position_agrees_with_a_ring_written_token_by_token(last: int, capacity: int):
    written = ring_after(last, capacity)
    for slot in range(capacity):
        found = window.slot_position(last, slot, capacity)
        if slot in written:
            assert found == written[slot]
        else:
            assert found < 0, f"the empty slot {slot} seems to hold position {found}"


@given(query=POSITIONS, size=WINDOWS)
def test_visible_is_the_last_w_positions_up_to_the_query(query: int, size: int | None):
    keys = range(-5, query + 6)
    oldest = 0 if size is None else max(0, query - size + 1)
    seen = [k for k in keys if window.visible(query, k, size)]
    assert seen == list(range(oldest, query + 1))


@given(last=POSITIONS, steps=st.integers(1, 8), capacity=CAPACITIES, size=WINDOWS)
def test_integers_numpy_and_torch_give_the_same_mask(
    last: int, steps: int, capacity: int, size: int | None
):
    queries = range(last, last + steps)
    end = last + steps - 1
    plain = [
        [bool(window.visible(q, window.slot_position(end, j, capacity), size))
         for j in range(capacity)]
        for q in queries
    ]  # fmt: skip
    slots = np.arange(capacity)
    in_numpy = window.visible(
        np.array(queries)[:, None], window.slot_position(np.int64(end), slots, capacity), size
    )
    held = window.slot_position(torch.tensor(end), torch.from_numpy(slots), capacity)
    in_torch = window.visible(torch.tensor(list(queries))[:, None], held, size)
    assert in_numpy.tolist() == plain
    assert in_torch.tolist() == plain


@given(size=st.integers(1, 5000), chunk=st.integers(1, 600))
def test_capacity_is_the_smallest_sufficient_multiple_of_the_chunk(size: int, chunk: int):
    found = window.capacity(size, chunk)
    assert found % chunk == 0
    assert found >= size + chunk - 1, "the last token of a chunk would overwrite a visible key"
    assert found - chunk < size + chunk - 1, "one chunk of slots is unused"


@given(
    position=POSITIONS,
    count=st.integers(0, 200),
    chunk=st.integers(1, 40),
    rings=st.lists(CAPACITIES, min_size=1, max_size=3),
)
def test_pieces_add_up_and_never_cross_the_end_of_a_ring(
    position: int, count: int, chunk: int, rings: list[int]
):
    found = list(window.pieces(position, count, chunk, rings))
    assert sum(found) == count
    for piece in found:
        assert 1 <= piece <= chunk
        for capacity in rings:
            first, last = position % capacity, (position + piece - 1) % capacity
            assert last - first == piece - 1, f"{piece} tokens at slot {first} of {capacity} wrap"
        position += piece


@given(position=POSITIONS, count=st.integers(1, 100), chunk=st.integers(1, 20), size=WINDOWS)
def test_every_query_of_every_piece_finds_exactly_its_window_in_the_ring(
    position: int, count: int, chunk: int, size: int | None
):
    capacity = position + count if size is None else window.capacity(size, chunk)
    held = ring_after(position - 1, capacity)
    for piece in window.pieces(position, count, chunk, [capacity]):
        held |= {p % capacity: p for p in range(position, position + piece)}
        assert_exact(held, position, piece, size, capacity)
        position += piece


# Rewinding


@given(
    size=st.integers(1, 20),
    slack=st.integers(0, 20),
    position=POSITIONS,
    piece=st.integers(1, 20),
)
def test_after_a_rewind_to_oldest_rewind_every_query_sees_its_window(
    size: int, slack: int, position: int, piece: int
):
    capacity = size + slack
    oldest = window.oldest_rewind(position, size, capacity)
    assume(oldest <= position and piece <= slack + 1)  # guaranteed by C >= W + chunk - 1
    held = ring_after(position - 1, capacity)
    held |= {p % capacity: p for p in range(oldest, oldest + piece)}
    assert_exact(held, oldest, piece, size, capacity)


@given(size=st.integers(2, 20), slack=st.integers(0, 20), position=POSITIONS)  # W=1 needs no past
def test_a_rewind_before_oldest_rewind_would_show_a_wrong_key(size: int, slack: int, position: int):
    capacity = size + slack
    oldest = window.oldest_rewind(position, size, capacity)
    if position <= capacity:
        assert oldest == 0, "nothing was overwritten, so every rewind is possible"
        return
    held = ring_after(position - 1, capacity)
    held[(oldest - 1) % capacity] = oldest - 1
    with pytest.raises(AssertionError, match="query"):
        assert_exact(held, oldest - 1, 1, size, capacity)


def test_a_ring_without_a_window_can_rewind_to_0():
    assert window.oldest_rewind(9, None, 12) == 0


def assert_exact(
    held: dict[int, int], first: int, piece: int, size: int | None, capacity: int
) -> None:
    """Assert that each query sees exactly the keys of its window in the ring `held`."""
    last = first + piece - 1
    for query in range(first, last + 1):
        slots = [
            slot
            for slot in range(capacity)
            if window.visible(query, window.slot_position(last, slot, capacity), size)
        ]
        oldest = 0 if size is None else max(0, query - size + 1)
        found = sorted(held.get(slot, -1) for slot in slots)
        assert found == list(range(oldest, query + 1)), f"query {query} sees positions {found}"
