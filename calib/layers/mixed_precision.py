"""Keep the most sensitive groups in higher precision, within a budget.

Groups are ranked by the divergence, in nats per linear, that quantizing the group alone causes. The
number to keep is limited by a share of the linears or by measuring the whole model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from math import expm1
from typing import Any

import torch
from torch import Tensor

from calib.layers.samples import Samples, evenly_spaced
from calib.layers.sensitivity import (
    Distance,
    Variants,
    each_group_alone,
    measure_variants,
    with_groups_stored_as,
)
from calib.layers.work_directory import WorkDirectory
from calib.options import Budget
from exporter.quantization.recipe import Recipe
from graphs.errors import MistralcError
from graphs.quant_scheme import Group, Scheme, default_scheme, groups
from runtime.system.progress import Stage

MeasureCounts = Callable[
    [Sequence[int]], Mapping[int, Distance]
]  # keyed by the number of kept groups
TRIED = 8  # numbers of kept groups that are measured in one pass over the weights
SAMPLES, SAMPLE_TOKENS = 2, 256  # samples to measure on, and the tokens used of each


def meets(budget: Budget, distance: Distance) -> bool:
    """Return whether a model at this distance from its checkpoint is within the budget."""
    if budget.max_kl is not None and distance.kl > budget.max_kl:
        return False
    return budget.max_ppl_increase is None or (
        expm1(distance.nll_increase) <= budget.max_ppl_increase
    )


def worst_first(
    every: Sequence[Group], cost: Mapping[str, float], share: float | None
) -> list[Group]:
    """Sort groups by divergence per linear, the worst first.

    With a `share`, return only groups that together have at most that share of all linears; a group
    that no longer fits is skipped.
    """
    order = sorted(every, key=lambda group: (-cost[group.name] / len(group.readers), group.name))
    if share is None:
        return order
    left = int(share * sum(len(group.readers) for group in every) + 1e-9)
    found = []
    for group in order:
        if len(group.readers) <= left:
            left -= len(group.readers)
            found.append(group)
    return found


def choose_count(most: int, budget: Budget, measure: MeasureCounts) -> tuple[int, Distance]:
    """Return how many of the worst groups to keep, at most `most`, and the resulting distance.

    If the budget needs a measurement, search for the smallest number that meets it, measuring up to
    `TRIED` numbers at a time. Raises MistralcError if `most` groups are not enough.
    """
    if not budget.needs_measurement:
        return most, measure([most])[most]
    low, high = 0, most  # the smallest number that meets the budget is between them, if any
    found: dict[int, Distance] = {}
    while True:
        tried = spaced_counts(low, high)
        found |= measure([count for count in tried if count not in found])
        good = next((count for count in tried if meets(budget, found[count])), None)
        if good is None:
            raise _unmet(budget, found[most], most)
        below = [count for count in tried if count < good]
        if not below or below[-1] == good - 1:
            return good, found[good]
        low, high = below[-1] + 1, good


def spaced_counts(low: int, high: int) -> list[int]:
    """Return at most `TRIED` integers from `low` to `high`, both included, denser near `low`."""
    steps = TRIED - 1
    return sorted({low + round((high - low) * (step / steps) ** 2) for step in range(steps + 1)})


def _unmet(budget: Budget, best: Distance, kept: int) -> MistralcError:
    wanted = []
    if budget.max_kl is not None:
        wanted.append(f"at most {budget.max_kl:g} nats of divergence")
    if budget.max_ppl_increase is not None:
        wanted.append(f"at most {budget.max_ppl_increase:.1%} more perplexity")
    return MistralcError(
        f"With {kept} groups in higher precision the model diverges from its checkpoint by "
        f"{best.kl:.4g} nats a token, and its perplexity changes by "
        f"{expm1(best.nll_increase):+.1%}; expected {' and '.join(wanted)}. Allow more, give a "
        "larger --keep-share, or choose another precision."
    )


def keep_worst(
    recipe: Recipe, weight: Callable[[str], Tensor], samples: Samples, budget: Budget,
    work: WorkDirectory, device: torch.device, stage: Stage,
) -> tuple[Recipe, dict[str, Any]]:  # fmt: skip
    """Return the recipe with the worst groups in higher precision, and the measurements.

    The cost of each group is stored in the work directory, so trying another budget is fast.
    """
    spec = recipe.spec
    every = tuple(groups(spec))
    count = min(len(samples.ids), SAMPLES)
    ids = evenly_spaced(samples.ids, count)[:, :SAMPLE_TOKENS]
    higher = higher_precision(recipe)

    def measured(variants: Variants, rest: Scheme | None, title: str) -> dict[str, Distance]:
        with stage(title, spec.num_hidden_layers) as advance:
            return measure_variants(
                recipe, weight, ids, variants, work.scratch("variants"), device,
                rest=rest, advance=advance,
            )  # fmt: skip

    def costs() -> dict[str, float]:
        found = measured(each_group_alone(spec), None, "Measuring each group")
        return {name: distance.kl for name, distance in sorted(found.items())}

    cost = work.cached("sensitivity", costs)
    worst = worst_first(every, cost, budget.share)

    def keeping(counts: Sequence[int]) -> dict[int, Distance]:
        variants = {
            str(n): frozenset(g.name for g in every) - {g.name for g in worst[:n]} for n in counts
        }
        found = measured(variants, higher, "Measuring the whole model")
        return {int(name): distance for name, distance in found.items()}

    chosen, distance = choose_count(len(worst), budget, keeping)
    names = [group.name for group in worst[:chosen]]
    return with_groups_stored_as(recipe, names, higher), {
        "budget": asdict(budget), "groups": names, "kl": distance.kl,
        "ppl_increase": expm1(distance.nll_increase), "kl_alone": cost,
        "tokens": ids.numel(),
    }  # fmt: skip


def higher_precision(recipe: Recipe) -> Scheme | None:
    """Return the scheme of kept groups: int8wo, or None (float) if the recipe is int8wo itself."""
    better = default_scheme("int8wo", block=None)
    return None if better in recipe.schemes.values() else better
