"""Logits do not depend on how a text is split: single tokens, chunks, turns, rows, growth.

The reference is the text fed one token at a time over the same ring.
`test_model_against_transformers.py` compares that with Hugging Face transformers.
"""

from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphs.spec import ModelSpec, RingSpec
from runtime.decoding.ring import Ring
from tests.support import tiny
from tests.support.make_checkpoint import tiny_spec

TOLERANCE = 1e-4
"""A matrix product over S tokens sums in another order than one over a single token. On these
models logits of up to 4 differed by 3e-6. One key too many or too few changes them by 0.9 and
more: `test_one_extra_key_exceeds_the_tolerance_by_far`.
"""

LONGEST = 64  # tokens: ten windows, so every ring wraps several times
CONTEXT = 64  # of the ring without a window
WINDOWS = [(5, None), (4, 16)]  # per layer; each pair shares one trace with the other tests
SPECS = [tiny_spec(vocab_size=64, layer_windows=windows) for windows in WINDOWS]


def assert_same(got: tiny.Logits, expected: tiny.Logits, how: str) -> None:
    difference = float(np.abs(got - expected).max())
    assert difference <= TOLERANCE, f"{how}: logits differ by {difference:.1e}"


def ring_of(spec: ModelSpec, chunk: int) -> Ring:
    return Ring(spec, RingSpec(chunk=chunk, context=CONTEXT))


@cache
def one_by_one(spec: ModelSpec, seed: int, count: int) -> tiny.Logits:
    ids = tiny.tokens(spec, count, seed)
    return tiny.in_turns(tiny.session(spec), ring_of(spec, 1), ids, [1] * count)


@st.composite
def splits(draw: st.DrawFn) -> list[int]:
    """Turns of any lengths, at most `LONGEST` tokens in all."""
    count = draw(st.integers(1, LONGEST))
    cuts = draw(st.sets(st.integers(1, count - 1), max_size=8)) if count > 1 else set()
    edges = [0, *sorted(cuts), count]
    return [b - a for a, b in pairwise(edges)]


# 80 examples of at most 64 steps take 3 s. Few seeds, so the cached reference is reused.
@settings(max_examples=80, deadline=None)
@given(
    spec=st.sampled_from(SPECS), chunk=st.integers(1, 24), turns=splits(), seed=st.integers(0, 3)
)
def test_any_turns_and_chunk_give_the_logits_of_single_token_steps(
    spec: ModelSpec, chunk: int, turns: list[int], seed: int
):
    ids = tiny.tokens(spec, LONGEST, seed)[: sum(turns)]
    got = tiny.in_turns(tiny.session(spec), ring_of(spec, chunk), ids, turns)
    expected = one_by_one(spec, seed, LONGEST)[: len(ids)]
    assert_same(got, expected, f"chunk {chunk}, turns {turns}")


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: str(spec.layer_windows))
def test_every_chunk_size_gives_the_logits_of_single_token_steps(spec: ModelSpec):
    ids = tiny.tokens(spec, LONGEST)
    expected = one_by_one(spec, 0, LONGEST)
    for chunk in range(1, LONGEST + 1):
        got = tiny.in_turns(tiny.session(spec), ring_of(spec, chunk), ids, [LONGEST])
        assert_same(got, expected, f"chunk {chunk}")


def lengths(window: int) -> dict[str, int]:
    return {"W-1": window - 1, "W": window, "W+1": window + 1, "2W+3": 2 * window + 3}


@pytest.mark.parametrize("case", lengths(1))
@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_around_the_window_prefill_equals_single_token_steps(case: str, chunk: int):
    for spec in SPECS:
        for window in spec.windows:
            if window is None:
                continue
            count = lengths(window)[case]
            ids = tiny.tokens(spec, count + 2)
            got = tiny.in_turns(tiny.session(spec), ring_of(spec, chunk), ids, [count, 1, 1])
            assert_same(got, one_by_one(spec, 0, LONGEST)[: count + 2], f"W={window}, {case}")


def test_a_growing_ring_gives_the_logits_of_a_full_one():
    spec, ids = SPECS[1], tiny.tokens(SPECS[1], LONGEST)
    growing, full = ring_of(spec, 4), ring_of(spec, 4)
    full.capacities = dict(full.full)
    turns = [1, 2, 3, 20, *[1] * 10, 28]
    sizes = []
    real = tiny.session(spec)

    class Watched:
        """The session, recording every size that was requested."""

        step = real.step

        def resize(self, capacities: Any) -> None:
            sizes.append(capacities[16])
            real.resize(capacities)

    got = tiny.in_turns(Watched(), growing, ids, turns)
    assert sizes == sorted(sizes)
    assert len(set(sizes)) >= 3, f"the ring must grow in several steps: {sizes}"
    expected = tiny.in_turns(real, full, ids, turns)
    # The same steps in the same order; only the number of masked slots differs.
    assert_same(got, expected, "growing ring")


def test_the_pytorch_decoder_also_decodes_over_a_wrapping_ring():
    spec = SPECS[1]
    ids = torch.from_numpy(tiny.tokens(spec, 40))
    capacity = {4: 6, 16: 18}
    shape = (spec.num_key_value_heads, spec.head_dim)
    past = [
        torch.zeros(1, shape[0], capacity[size], shape[1])
        for size in spec.layer_windows
        if size is not None
        for _ in range(2)
    ]
    found, first = [], torch.zeros(1, 1, dtype=torch.int64)
    with torch.inference_mode():
        for position, token in enumerate(ids):
            logits, past = tiny.decoder(spec)(token.view(1, 1), first + position, first, past)
            found.append(logits[0, 0].numpy())
    assert_same(np.stack(found), tiny.at_once(tiny.decoder(spec), ids.numpy()), "eager steps")


@pytest.mark.parametrize("windows", [(6, None), (4, 15)], ids=["W 5 to 6", "W 16 to 15"])
def test_one_extra_key_exceeds_the_tolerance_by_far(windows: tuple[int | None, ...]):
    """Agreement above therefore means that no key was missing or extra."""
    spec = SPECS[0] if None in windows else SPECS[1]
    wrong = tiny.decoder(tiny_spec(vocab_size=64, layer_windows=windows))
    ids = tiny.tokens(spec, LONGEST)
    difference = np.abs(tiny.at_once(wrong, ids) - one_by_one(spec, 0, LONGEST)).max()
    assert difference > 100 * TOLERANCE


# Two rows


def two_rows(
    spec: ModelSpec, ring: Ring, plan: list[tuple[int, int]], texts: list[tiny.Ids], junk: int
) -> list[tiny.Logits]:
    """Feed rows by `plan`, pairs of (row, tokens); the other row gets `junk` at its next position.

    Returns logits by row [n, V]. No step crosses the end of either row's ring.
    """
    session = tiny.session(spec, batch=2)
    session.resize(ring.capacities)
    found: list[list[tiny.Logits]] = [[], []]
    for row, wanted in plan:
        left = wanted
        while left:
            count = min(next(ring.pieces(left, r)) for r in (0, 1))
            for r in (0, 1):
                if ring.grow(count, r):
                    session.resize(ring.capacities)
            ids = np.full((2, count), junk, np.int64)
            here = ring.positions[row]
            ids[row] = texts[row][here : here + count]
            positions = np.array(ring.positions)[:, None] + np.arange(count)
            indices = np.arange(count)[None].repeat(2, 0)
            found[row].append(session.step(ids, positions, indices)[row].copy())
            ring.advance(count, row)
            left -= count
    return [np.concatenate(rows) for rows in found]


@settings(max_examples=30, deadline=None)
@given(
    chunk=st.integers(1, 9),
    plan=st.lists(st.tuples(st.integers(0, 1), st.integers(1, 12)), min_size=2, max_size=10),
    junk=st.integers(0, 63),
)
def test_rows_do_not_affect_each_other_and_an_idle_row_stays_intact(
    chunk: int, plan: list[tuple[int, int]], junk: int
):
    spec = SPECS[1]
    plan = [(0, 1), (1, 1), *plan]
    texts = [tiny.tokens(spec, 130, seed) for seed in (0, 1)]
    ring = Ring(spec, RingSpec(chunk=chunk, context=CONTEXT, max_batch=2), rows=2)
    for row, got in enumerate(two_rows(spec, ring, plan, texts, junk)):
        alone = one_by_one(spec, row, 130)[: len(got)]
        assert_same(got, alone, f"row {row}, chunk {chunk}, plan {plan}")


def test_two_active_rows_get_the_logits_of_each_alone():
    spec, lead = SPECS[1], 7  # row 0 is this far ahead
    texts = [tiny.tokens(spec, LONGEST, seed) for seed in (0, 1)]
    session = tiny.session(spec, batch=2)
    session.resize(Ring(spec, RingSpec(chunk=4, context=CONTEXT)).full)
    index = np.zeros((2, 1), np.int64)
    for step in range(LONGEST):
        # Row 1 stays at position 0 until row 0 has its lead.
        here = [step, max(0, step - lead)]
        ids = np.array([[text[place]] for text, place in zip(texts, here, strict=True)])
        logits = session.step(ids, np.array(here)[:, None], index)
        for row, place in enumerate(here):
            alone = one_by_one(spec, row, LONGEST)[place]
            assert_same(logits[row, 0], alone, f"row {row} at {place}")
