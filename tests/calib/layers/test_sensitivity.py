"""The cost of each group, and the groups kept in higher precision to meet a budget."""

from math import expm1
from pathlib import Path

import pytest
import torch

from calib.layers.mixed_precision import choose_count, meets, spaced_counts, worst_first
from calib.layers.sensitivity import (
    Distance,
    each_group_alone,
    measure_variants,
    with_groups_stored_as,
)
from calib.options import Budget
from exporter.decoder.model import logits_at
from exporter.quantization.recipe import Recipe
from exporter.quantization.reference import simulate
from graphs.errors import MistralcError, UsageError
from graphs.quant_scheme import Scheme, groups
from tests.support import tiny
from tests.support.make_checkpoint import tiny_spec

SPEC = tiny_spec(num_hidden_layers=3)
EVERY = tuple(groups(SPEC))
NAMES = frozenset(group.name for group in EVERY)
INT4, INT8 = Scheme(codes="int4", block=32), Scheme(codes="int8")
RECIPE = Recipe(
    spec=SPEC, activation="float16",
    schemes={name: INT4 for group in EVERY for name in group.readers},
)  # fmt: skip
IDS = torch.from_numpy(tiny.tokens(SPEC, 48)).view(2, 24)


def distances(
    path: Path, variants: dict[str, frozenset[str]], rest: Scheme | None = None
) -> dict[str, Distance]:
    weights = tiny.weights(SPEC)
    with torch.inference_mode():
        return measure_variants(
            RECIPE, weights.__getitem__, IDS, variants, path / "states", torch.device("cpu"), rest
        )


def test_a_model_with_nothing_quantized_has_zero_distance(tmp_path: Path) -> None:
    found = distances(tmp_path, {"none": frozenset()})["none"]
    assert found == Distance(kl=0.0, nll_increase=0.0)


def test_the_divergence_is_that_of_the_simulated_model(tmp_path: Path) -> None:
    names = {group.name: frozenset({group.name}) for group in EVERY[5:7]}
    found = distances(tmp_path, {**names, "all": NAMES})
    weights = tiny.weights(SPEC)
    rows = torch.arange(23)
    ideal = logits_at(tiny.decoder(SPEC), IDS, rows).log_softmax(-1)
    for name, quantized in {**names, "all": NAMES}.items():
        recipe = with_groups_stored_as(RECIPE, NAMES - quantized, None)
        got = logits_at(simulate(recipe, weights.__getitem__), IDS, rows).log_softmax(-1)
        kl = (ideal.exp() * (ideal - got)).sum(-1).mean()
        # the same float32 arithmetic in a different order; a divergence is a difference of
        # nearly equal numbers of about 5
        assert found[name].kl == pytest.approx(float(kl), rel=1e-3, abs=1e-6)
        loss = (ideal - got).gather(-1, IDS[:, 1:, None]).mean()
        assert found[name].nll_increase == pytest.approx(float(loss), rel=1e-3, abs=1e-5)


def test_every_group_costs_something_but_less_than_all_together(tmp_path: Path) -> None:
    found = distances(tmp_path, {**each_group_alone(SPEC), "all": NAMES})
    costs = [found[group.name].kl for group in EVERY]
    assert min(costs) > 0
    assert max(costs) < found["all"].kl


def test_keeping_everything_in_eight_bits_leaves_little_divergence(tmp_path: Path) -> None:
    found = distances(tmp_path, {"all": NAMES, "kept": frozenset()}, rest=INT8)
    # 8 bits are 16 times finer than 4, and divergence is quadratic in the error
    assert found["kept"].kl < found["all"].kl / 50


def test_a_kept_group_loses_its_numbers_but_not_its_smoothing() -> None:
    group = EVERY[0]
    name = group.readers[0]
    tensors = {
        part: torch.ones(1)
        for part in (name, f"{name}_scale", f"{group.name}.smoothing", f"{group.name}.input_scale",
                     f"{EVERY[1].readers[0]}_scale")
    }  # fmt: skip
    full = Recipe(
        spec=SPEC, activation="float16", schemes=RECIPE.schemes, tensors=tensors
    )  # fmt: skip
    recipe = with_groups_stored_as(full, {group.name}, INT8)
    assert set(recipe.tensors) == {f"{group.name}.smoothing", f"{EVERY[1].readers[0]}_scale"}
    assert recipe.schemes[name] == INT8
    assert recipe.schemes[EVERY[1].readers[0]] == INT4


def test_groups_are_sorted_by_cost_per_linear() -> None:
    cost = dict.fromkeys(NAMES, 1e-3) | {EVERY[0].name: 0.3, EVERY[1].name: 0.2}
    # 0.3 for three linears is less per linear than 0.2 for one
    assert [group.name for group in worst_first(EVERY, cost, None)[:2]] == [
        EVERY[1].name, EVERY[0].name,
    ]  # fmt: skip


def test_a_share_of_the_linears_is_never_exceeded() -> None:
    cost = {group.name: float(i) for i, group in enumerate(EVERY)}
    for share in (0.0, 0.1, 0.2, 0.5, 1.0):
        found = worst_first(EVERY, cost, share)
        assert sum(len(group.readers) for group in found) <= share * 21 + 1e-9
    assert len(worst_first(EVERY, cost, 1.0)) == 12


@pytest.mark.parametrize("needed", [0, 1, 5, 99, 120])
def test_the_smallest_number_of_groups_that_meets_the_budget_is_kept(needed: int) -> None:
    asked: list[int] = []

    def curve(counts: list[int]) -> dict[int, Distance]:
        asked.extend(counts)
        return {n: Distance(kl=1.0 if n < needed else 0.01, nll_increase=0.0) for n in counts}

    assert choose_count(120, Budget(max_kl=0.02), curve)[0] == needed
    assert len(asked) == len(set(asked)) <= 24  # three rounds of eight


def test_a_budget_that_cannot_be_met_is_an_error_with_numbers() -> None:
    far = Distance(kl=0.5, nll_increase=0.25)
    with pytest.raises(MistralcError, match=r"With 7 groups .* 0\.5 nats .* at most 3\.0% more"):
        choose_count(7, Budget(max_ppl_increase=0.03), lambda counts: dict.fromkeys(counts, far))


def test_perplexity_grows_by_the_exponential_of_the_loss() -> None:
    budget = Budget(max_ppl_increase=expm1(0.02))
    assert meets(budget, Distance(kl=9, nll_increase=0.02 - 1e-9))
    assert not meets(budget, Distance(kl=0, nll_increase=0.02 + 1e-9))


def test_tried_numbers_include_both_ends() -> None:
    assert spaced_counts(3, 3) == [3]
    assert spaced_counts(0, 120)[0] == 0
    assert spaced_counts(0, 120)[-1] == 120


def test_a_negative_budget_is_refused() -> None:
    with pytest.raises(UsageError, match="--max-kl is -1"):
        Budget(max_kl=-1)
