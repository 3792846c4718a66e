"""Ring positions: growth, room and rewinds, checked against a simulated memory.

`Memory` holds what a session's ring would hold, slot by slot. Every accepted position must find
exactly the tokens of its window there.
"""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from graphs import window
from graphs.errors import MistralcError
from graphs.spec import RingSpec
from runtime.decoding.ring import ContextFullError, Ring
from tests.support import tiny
from tests.support.make_checkpoint import tiny_spec


class Memory:
    """The slots of one window, each holding the serial number of the token written there."""

    def __init__(self, ring: Ring, size: int | None) -> None:
        self.ring, self.size = ring, size
        self.slots = [-1] * ring.capacities[size]
        self.text: list[int] = []  # serial number of the token at each position
        self.written = 0

    def resize(self) -> None:
        kept = self.slots[: self.ring.capacities[self.size]]
        self.slots = kept + [-1] * (self.ring.capacities[self.size] - len(kept))

    def step(self, count: int) -> None:
        """Write `count` tokens at the ring's position; every one must see its window."""
        first, capacity = self.ring.positions[0], len(self.slots)
        assert first % capacity + count <= capacity, f"{count} tokens at {first} cross the end"
        del self.text[first:]
        for position in range(first, first + count):
            self.slots[position % capacity] = self.written
            self.text.append(self.written)
            self.written += 1
        for query in range(first, first + count):
            held = [window.slot_position(first + count - 1, j, capacity) for j in range(capacity)]
            seen = sorted(
                self.slots[j] for j in range(capacity) if window.visible(query, held[j], self.size)
            )
            oldest = 0 if self.size is None else max(0, query - self.size + 1)
            assert seen == self.text[oldest : query + 1], f"position {query} sees wrong tokens"


def feed(ring: Ring, memories: list[Memory], count: int) -> None:
    """Feed `count` tokens as the generator does."""
    for piece in ring.pieces(count):
        if ring.grow(piece):
            for memory in memories:
                memory.resize()
        for memory in memories:
            memory.step(piece)
        ring.advance(piece)


def sliding_ring(size: int, chunk: int) -> Ring:
    return Ring(tiny_spec(window=size), RingSpec(chunk=chunk, context=1))


def full_ring(context: int, chunk: int) -> Ring:
    return Ring(tiny_spec(), RingSpec(chunk=chunk, context=context))


# The worked example of runtime/decoding/ring.py: W=4, chunk=3, C=6


def test_a_prompt_of_five_at_position_5_is_cut_into_1_3_1():
    ring = sliding_ring(4, 3)
    ring.advance(5)
    assert list(ring.pieces(5)) == [1, 3, 1]


def test_position_10_can_rewind_to_7_but_not_to_6():
    ring = sliding_ring(4, 3)
    ring.advance(10)
    assert ring.oldest_rewind() == 7
    with pytest.raises(MistralcError, match=r"at position 10 and can go back to 7 .* not to 6"):
        ring.rewind(6)
    assert ring.positions == [10], "a refused rewind moved the sequence"
    ring.rewind(7)
    assert ring.positions == [7]


# Growth


def test_a_ring_starts_at_one_chunk_and_doubles_up_to_its_capacity():
    ring = full_ring(context=40, chunk=8)
    sizes = []
    for _ in range(40):
        ring.grow(1)
        ring.advance(1)
        sizes.append(ring.capacities[None])
    assert list(dict.fromkeys(sizes)) == [8, 16, 32, 40]


def test_grow_says_whether_the_session_must_be_resized():
    ring = full_ring(context=40, chunk=8)
    assert not ring.grow(8)
    assert ring.grow(9)
    assert not ring.grow(9), "it has grown already"


def test_layers_with_different_windows_grow_to_their_own_capacities():
    spec = tiny_spec(layer_windows=(4, 16))
    ring = Ring(spec, RingSpec(chunk=3, context=1))
    assert ring.full == {4: 6, 16: 18}
    for _ in range(30):
        ring.grow(1)
        ring.advance(1)
    assert ring.capacities == ring.full


@given(
    size=st.none() | st.integers(1, 20),
    chunk=st.integers(1, 12),
    turns=st.lists(st.integers(1, 25), max_size=6),
)
def test_every_token_sees_exactly_its_window_while_the_ring_grows(
    size: int | None, chunk: int, turns: list[int]
):
    ring = full_ring(sum(turns) + 1, chunk) if size is None else sliding_ring(size, chunk)
    memory = Memory(ring, size)
    for turn in turns:
        feed(ring, [memory], turn)
        assert ring.capacities[size] <= ring.full[size]


# Room


def test_a_sliding_model_has_unlimited_room():
    ring = sliding_ring(4, 3)
    ring.advance(10**9)
    assert ring.room() is None
    ring.check_room(10**9)


def test_one_layer_without_a_window_limits_the_room():
    ring = Ring(tiny_spec(layer_windows=(4, None)), RingSpec(chunk=4, context=10))
    ring.advance(7)
    assert ring.room() == 3
    ring.check_room(3)
    with pytest.raises(ContextFullError, match=r"4 tokens .* position 7, .* holds 10 in all"):
        ring.check_room(4)


def test_a_text_that_is_too_long_is_refused_before_its_first_piece():
    ring = full_ring(context=10, chunk=4)
    with pytest.raises(ContextFullError, match="--context"):
        ring.pieces(11)  # not even iterated


def test_rows_have_their_own_positions():
    ring = Ring(tiny_spec(), RingSpec(chunk=4, context=10, max_batch=2), rows=2)
    ring.advance(6, row=1)
    assert (ring.room(0), ring.room(1)) == (10, 4)
    ring.rewind(2, row=1)
    assert ring.positions == [0, 2]


# Rewinding


@pytest.mark.parametrize("position", [-1, 6])
def test_rewinding_to_a_position_outside_the_sequence_is_refused(position: int):
    ring = full_ring(context=10, chunk=4)
    ring.advance(5)
    with pytest.raises(MistralcError, match="has positions 0 to 5"):
        ring.rewind(position)


@settings(deadline=None)
@given(
    size=st.integers(1, 12),
    chunk=st.integers(1, 8),
    before=st.integers(1, 60),
    back=st.integers(0, 30),
    after=st.integers(1, 30),
)
def test_after_a_rewind_every_token_sees_the_new_text_only(
    size: int, chunk: int, before: int, back: int, after: int
):
    ring = sliding_ring(size, chunk)
    memory = Memory(ring, size)
    feed(ring, [memory], before)
    target = max(before - back, ring.oldest_rewind())
    assume(target <= before)
    ring.rewind(target)
    feed(ring, [memory], after)


@settings(deadline=None)
@given(
    sizes=st.sampled_from([(4, 4), (4, 16), (7, None)]),
    chunk=st.integers(1, 8),
    moves=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=2, max_size=8),
)
def test_after_any_number_of_rewinds_every_token_sees_the_new_text_only(
    sizes: tuple[int | None, ...], chunk: int, moves: list[tuple[int, int]]
):
    """Repeated rewinds must not go further back than the ring holds."""
    spec = tiny_spec(layer_windows=sizes)
    ring = Ring(spec, RingSpec(chunk=chunk, context=200))
    memories = [Memory(ring, size) for size in spec.windows]
    feed(ring, memories, 20)
    for forward, back in moves:
        feed(ring, memories, forward)
        here = ring.positions[0]
        ring.rewind(min(here, max(here - back, ring.oldest_rewind())))
        feed(ring, memories, 1)


def test_rewinding_to_0_is_always_possible():
    ring = sliding_ring(4, 3)
    memory = Memory(ring, 4)
    feed(ring, [memory], 50)
    ring.rewind(0)
    feed(ring, [memory], 50)


# Rewinding a real model

SPEC = tiny_spec(vocab_size=64, layer_windows=(4, 16))


def continuation(ring: Ring, ids: tiny.Ids) -> tiny.Logits:
    return tiny.in_turns(tiny.session(SPEC), ring, ids, [1] * len(ids))


@pytest.mark.parametrize("length", [5, 18, 19, 40])
def test_after_a_rewind_a_model_continues_bit_identically(length: int):
    kept, abandoned, new = (tiny.tokens(SPEC, 40, seed) for seed in (0, 1, 2))
    spec = RingSpec(chunk=3, context=1)
    ring = Ring(SPEC, spec)
    tiny.in_turns(tiny.session(SPEC), ring, np.append(kept[:length], abandoned[:2]), [length, 1, 1])
    ring.rewind(max(length, ring.oldest_rewind()))
    assert ring.positions == [length], "two tokens are within the slack of a chunk of 3"
    got = continuation(ring, new)

    straight = Ring(SPEC, spec)
    tiny.in_turns(tiny.session(SPEC), straight, kept[:length], [length])
    # The same operations on the same numbers: the bits must agree.
    np.testing.assert_array_equal(got, continuation(straight, new))


def test_a_rewind_beyond_the_limit_would_change_the_logits():
    """The limit is therefore exact, not merely cautious."""
    kept, new = tiny.tokens(SPEC, 40, 0), tiny.tokens(SPEC, 10, 2)
    ring = Ring(SPEC, RingSpec(chunk=3, context=1))
    tiny.in_turns(tiny.session(SPEC), ring, kept, [40])
    too_far = ring.oldest_rewind() - 1
    with pytest.raises(MistralcError, match="Start over"):
        ring.rewind(too_far)
    ring.positions[0] = too_far
    got = continuation(ring, new)

    straight = Ring(SPEC, RingSpec(chunk=3, context=1))
    tiny.in_turns(tiny.session(SPEC), straight, kept[:too_far], [too_far])
    # 1e-3 is ten times the tolerance for rounding in test_prefill_equals_decode.py.
    assert np.abs(got - continuation(straight, new)).max() > 1e-3
