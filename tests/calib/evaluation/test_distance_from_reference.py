"""Perplexity of a bundle, and its divergence from the PyTorch decoder."""

import json
import math

import numpy as np
import pytest

from exporter.checks.evaluate import Evaluation, evaluate, steps
from exporter.decoder.load import load_decoder
from graphs.spec import ModelSpec
from runtime.backends.session import Ids
from runtime.measure.perplexity import divergences
from tests.calib.evaluation.samples import PLAIN, SLIDING, build_of, log_softmax
from tests.support import tiny

ANOTHER = 1  # seed of other weights of the same shape


def texts(spec: ModelSpec, count: int = 3, length: int = 30) -> Ids:
    return tiny.tokens(spec, count * length).reshape(count, length)


@pytest.mark.parametrize("spec", [SLIDING, PLAIN], ids=["sliding", "plain"])
def test_a_bundle_has_zero_distance_from_its_own_weights(spec: ModelSpec):
    found = evaluate(tiny.session(spec), build_of(spec), texts(spec), tiny.decoder(spec))
    assert found.tokens == 3 * 29
    assert found.kl is not None
    # Logits of about 1 that differ by 1e-6 give a divergence of half the square of that.
    assert 0 <= found.kl < 1e-10
    assert found.top1 == 1
    assert found.reference_perplexity == pytest.approx(found.perplexity, rel=1e-5)


@pytest.mark.parametrize("spec", [SLIDING, PLAIN], ids=["sliding", "plain"])
def test_distance_is_the_mean_divergence_of_the_bundle_from_the_reference(spec: ModelSpec):
    cut, other = texts(spec), tiny.decoder(spec, ANOTHER)
    found = evaluate(tiny.session(spec), build_of(spec), cut, other)
    p, q = (
        np.concatenate([log_softmax(tiny.at_once(model, ids)[:-1]) for ids in cut])
        for model in (other, tiny.decoder(spec))
    )  # reference, bundle
    true = cut[:, 1:].reshape(-1, 1)
    # Means over 87 positions of numbers of about 1, which float32 rounding changes by 1e-6.
    assert found.kl == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), abs=1e-5)
    assert found.kl > 0.1, "other weights have to be far away"
    assert found.top1 == (p.argmax(-1) == q.argmax(-1)).mean()
    assert found.top1 < 0.5
    for log, perplexity in ((p, found.reference_perplexity), (q, found.perplexity)):
        mean = -np.take_along_axis(log, true, -1).mean()
        assert perplexity == pytest.approx(math.exp(mean), rel=1e-5)


def test_the_reference_uses_the_same_window_as_the_bundle():
    far = load_decoder(PLAIN, tiny.weights(PLAIN).__getitem__)  # the same weights, no window
    found = evaluate(tiny.session(SLIDING), build_of(SLIDING), texts(SLIDING), far)
    assert found.kl is not None
    assert found.kl > 1e-4, "a million times the divergence with equal windows"


def test_divergence_is_zero_for_equal_distributions_and_exact_for_a_biased_coin():
    fair, bent = np.log([[0.5, 0.5]]), np.log([[0.9, 0.1]])
    same, known = (np.concatenate(list(divergences(fair, q))) for q in (fair, bent))
    assert same == 0
    # 0.5 ln(0.5/0.9) + 0.5 ln(0.5/0.1), to the last digits of float64
    assert known == pytest.approx(0.5 * math.log(0.25 / 0.09), rel=1e-12)


@pytest.mark.parametrize("compared", [False, True])
def test_progress_adds_up_to_the_announced_total(compared: bool):
    counted: list[int] = []
    reference = tiny.decoder(PLAIN) if compared else None
    evaluate(tiny.session(PLAIN), build_of(PLAIN), texts(PLAIN), reference, counted.append)
    assert sum(counted) == steps(texts(PLAIN), compared=compared)


def test_results_convert_to_json_and_to_a_table():
    alone = Evaluation(perplexity=math.inf, tokens=1000)
    assert json.loads(json.dumps(alone.to_json(), allow_nan=False))["perplexity"] is None
    assert alone.to_markdown().splitlines()[-1] == "| 1,000 | inf |"
    both = Evaluation(perplexity=11, tokens=9, reference_perplexity=10, kl=0.025, top1=0.5)
    lines = both.to_markdown().splitlines()
    assert lines[-1] == "| 9 | 11.0000 | 10.0000 | +10.00% | 2.50e-02 | 50.00% |"
    assert len({line.count("|") for line in lines}) == 1
