"""Perplexity of windows: known cases, pieces, the ring. `test_smollm2.py` uses real weights."""

import math
import tracemalloc
from collections.abc import Mapping

import numpy as np
import pytest

from graphs.build import Build, Storage
from graphs.contract import GraphContract
from graphs.errors import MistralcError, UsageError
from graphs.precisions import PRECISIONS
from graphs.spec import ModelSpec, RingSpec
from graphs.targets import TARGETS
from runtime.backends.session import Ids, Logits
from runtime.measure.perplexity import ROWS, Scores, log_likelihoods, predictions, score
from tests.support import tiny
from tests.support.make_checkpoint import tiny_spec

WINDOW, CHUNK = 8, 3  # C = 12: pieces of 3, and a ring that wraps within the texts below
SLIDING, PLAIN = tiny_spec(window=WINDOW), tiny_spec()
MIXED = tiny_spec(layer_windows=(None, WINDOW))


def build_of(spec: ModelSpec, context: int = 64, chunk: int = CHUNK) -> Build:
    ring = RingSpec(chunk=chunk, context=context)
    return Build(
        target=TARGETS["cpu"], precision=PRECISIONS["fp32"], storage=Storage(),
        contract=GraphContract(spec=spec, ring=ring, activation="float32"),
    )  # fmt: skip


def texts(spec: ModelSpec, count: int, length: int) -> Ids:
    return tiny.tokens(spec, count * length, seed=length).reshape(count, length)


def exact(logits: Logits, targets: Ids) -> np.ndarray:
    """Log-likelihoods [n] in float64, by the definition."""
    wide = logits.astype(np.float64)
    return wide[np.arange(len(targets)), targets] - np.logaddexp.reduce(wide, axis=-1)


class Scripted:
    """A session that returns the same logits for every step."""

    def __init__(self, logits: Logits) -> None:
        self.logits = logits  # [V]
        self.fed: list[int] = []

    def resize(self, capacities: Mapping[int | None, int]) -> None:
        pass

    def step(self, input_ids: Ids, position_ids: Ids, logits_indices: Ids) -> Logits:
        self.fed += input_ids[0].tolist()
        return np.broadcast_to(self.logits, (1, logits_indices.shape[1], len(self.logits)))


# Definition


def test_uniform_logits_give_a_perplexity_of_the_vocabulary_size():
    session = Scripted(np.full(PLAIN.vocab_size, 7, np.float32))
    scores = score(session, build_of(PLAIN), texts(PLAIN, 3, 20))
    assert scores.tokens == 3 * 19
    # Equal logits give exactly equal shares; only log 320 and the sum of 57 of it are rounded.
    assert scores.perplexity == pytest.approx(PLAIN.vocab_size, rel=1e-12)


def test_a_certain_model_has_perplexity_1_if_right_and_a_finite_nll_if_wrong():
    logits = np.zeros(PLAIN.vocab_size, np.float32)
    logits[5] = 1000
    session, build = Scripted(logits), build_of(PLAIN)
    assert score(session, build, np.full((2, 9), 5)).perplexity == 1
    assert score(session, build, np.full((2, 9), 6)).nll == 2 * 8 * 1000
    assert Scores(nll=1e6, tokens=1).perplexity == math.inf


def test_log_likelihoods_equal_a_float64_softmax_for_any_rows_and_scale():
    random = np.random.default_rng(0)
    for scale in (1, 30, 3e4):
        logits = (scale * random.standard_normal((2 * ROWS + 3, 500))).astype(np.float32)
        targets = random.integers(0, 500, len(logits))
        expected = exact(logits, targets)
        # The difference of two logits is rounded to 6e-8 of their size, half a unit of float32.
        # The sum of exponentials is off by 1e-7. Together: 1e-7 of the range of the logits.
        difference = np.abs(log_likelihoods(logits, targets) - expected).max()
        assert difference < 2e-7 * max(1, 10 * scale)


def test_scoring_holds_one_block_of_rows_at_a_time():
    logits, targets = np.zeros((20 * ROWS, 1000), np.float32), np.zeros(20 * ROWS, np.int64)
    tracemalloc.start()
    log_likelihoods(logits, targets)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # A block is held twice, before and after the exponential. All rows would be 20 blocks.
    assert peak < 4 * ROWS * logits[0].nbytes


# Pieces and the ring


@pytest.mark.parametrize("spec", [SLIDING, PLAIN, MIXED], ids=["sliding", "plain", "mixed"])
@pytest.mark.parametrize("length", [2, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 3, 40])
def test_scores_in_pieces_equal_those_of_one_pass(spec: ModelSpec, length: int):
    cut = texts(spec, 3, length)
    got = score(tiny.session(spec), build_of(spec), cut)
    logits = [tiny.at_once(tiny.decoder(spec), ids)[:-1] for ids in cut]
    expected = -sum(exact(row, ids[1:]).sum() for row, ids in zip(logits, cut, strict=True))
    assert got.tokens == 3 * (length - 1)
    # Logits are about 1 and differed by 1e-6: summation order in float32.
    assert got.nll / got.tokens == pytest.approx(expected / got.tokens, abs=1e-5)


def test_the_window_changes_the_perplexity():
    cut = texts(SLIDING, 2, 40)
    session, build = tiny.session(SLIDING), build_of(SLIDING)
    plain = score(tiny.session(PLAIN), build_of(PLAIN), cut)
    # 1,000 times the tolerance above.
    assert abs(score(session, build, cut).nll - plain.nll) / plain.tokens > 1e-2


def test_every_window_starts_with_an_empty_ring():
    cut = texts(SLIDING, 3, 30)
    session, build = tiny.session(SLIDING), build_of(SLIDING)
    together = score(session, build, cut).nll
    alone = [score(session, build, cut[i : i + 1]).nll for i in (2, 0, 1)]
    assert together == pytest.approx(
        sum(alone), rel=1e-12
    )  # the same numbers in another summation order


def test_pieces_come_in_order_with_their_targets_and_are_counted():
    cut = texts(SLIDING, 2, 20)
    session, counted = tiny.session(SLIDING), []
    found: list[list[Logits]] = [[], []]
    for piece in predictions(session, build_of(SLIDING), cut, counted.append):
        assert piece.start == sum(len(logits) for logits in found[piece.window])
        assert len(piece.logits) <= CHUNK
        after = piece.start + 1
        assert (
            piece.targets.tolist() == cut[piece.window, after : after + len(piece.logits)].tolist()
        )
        found[piece.window].append(piece.logits.copy())
    assert sum(counted) == 2 * 19
    for ids, logits in zip(cut, found, strict=True):
        reference = tiny.at_once(tiny.decoder(SLIDING), ids)[:-1]
        assert np.abs(np.concatenate(logits) - reference).max() < 1e-5  # as above


def test_the_last_token_of_a_window_is_a_target_only():
    session = Scripted(np.zeros(PLAIN.vocab_size, np.float32))
    score(session, build_of(PLAIN), np.arange(20).reshape(2, 10))
    assert session.fed == [*range(9), *range(10, 19)]


# Refusals


def test_a_window_longer_than_the_context_is_refused_unless_the_model_slides():
    for spec in (PLAIN, MIXED):
        session = Scripted(np.zeros(spec.vocab_size, np.float32))
        assert score(session, build_of(spec, context=20), texts(spec, 1, 20)).tokens == 19
        session.fed.clear()
        with pytest.raises(UsageError, match=r"Windows of 21 tokens .* holds 20 .*--length 20"):
            score(session, build_of(spec, context=20), texts(spec, 1, 21))
        assert session.fed == [], "it must be refused before the session runs"
    sliding = Scripted(np.zeros(SLIDING.vocab_size, np.float32))
    assert score(sliding, build_of(SLIDING, context=20), texts(SLIDING, 1, 90)).tokens == 89


@pytest.mark.parametrize("token", [-1, PLAIN.vocab_size])
def test_a_token_outside_the_vocabulary_is_refused(token: int):
    cut = texts(PLAIN, 1, 9)
    cut[0, 4] = token
    with pytest.raises(MistralcError, match=rf"holds token {token}; .* tokens are 0 to 319"):
        score(tiny.session(PLAIN), build_of(PLAIN), cut)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_nan_and_infinite_logits_are_an_error(broken: float):
    logits = np.zeros(PLAIN.vocab_size, np.float32)
    logits[3] = broken
    with pytest.raises(MistralcError, match="NaN or infinity after token 0 of window 0"):
        score(Scripted(logits), build_of(PLAIN), texts(PLAIN, 1, 9))
