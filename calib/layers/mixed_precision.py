"""Which groups stay in higher precision, so that a budget is met. Knows no model and no file.

Groups are kept in the order of what they cost: nats of divergence that the group alone causes, for
each of its linears. How many, a share of the linears bounds, or a measurement of the whole.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import expm1
from typing import Any

import torch
from torch import Tensor

from calib.layers.samples import Samples, spread
from calib.layers.sensitivity import Distance, Variants, alone, kept, measure
from calib.layers.work_directory import Work
from exporter.quantization.recipe import Recipe
from graphs.errors import MistralcError, UsageError
from graphs.quant_scheme import Group, Scheme, default_scheme, groups
from runtime.system.progress import Stage

Measure = Callable[[Sequence[int]], Mapping[int, Distance]]  # by how many groups are kept
TRIED = 8  # numbers of kept groups that are measured together
TEXTS, TEXT = 2, 256  # samples that are measured on, and tokens of each


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What quantization may cost. None is no bound; without any, every group is quantized.

    `share` is the most linears that are kept, as a share of all; `max_kl` the most divergence, in
    nats a token; `max_ppl_increase` how much perplexity may grow, 0.03 for 3%.
    """

    share: float | None = None
    max_kl: float | None = None
    max_ppl_increase: float | None = None

    def __post_init__(self) -> None:
        for option, value in (("--keep-share", self.share), ("--max-kl", self.max_kl),
                              ("--max-ppl-increase", self.max_ppl_increase)):  # fmt: skip
            if value is not None and not 0 <= value < float("inf"):
                raise UsageError(f"{option} is {value}; a number from 0 up is expected.")

    @property
    def asks(self) -> bool:
        """Whether anything is bounded."""
        return any(v is not None for v in (self.share, self.max_kl, self.max_ppl_increase))

    @property
    def measured(self) -> bool:
        """Whether only a measurement of the whole tells if the budget is met."""
        return self.max_kl is not None or self.max_ppl_increase is not None

    def met(self, distance: Distance) -> bool:
        """Whether a model at this distance from its checkpoint is good enough."""
        if self.max_kl is not None and distance.kl > self.max_kl:
            return False
        return self.max_ppl_increase is None or (
            expm1(distance.nll_increase) <= self.max_ppl_increase
        )


def worst_first(
    every: Sequence[Group], cost: Mapping[str, float], share: float | None
) -> list[Group]:
    """Sort groups by divergence for each linear, the worst first.

    With a `share`, only those are returned that together have at most that share of all linears: a
    group that no longer fits is passed over.
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


def choose(most: int, budget: Budget, measure: Measure) -> tuple[int, Distance]:
    """Return how many of the worst groups to keep, of at most `most`, and how far off the rest is.

    Where something is to be measured, the least number that meets it is looked for, at most
    `TRIED` numbers at a time. Raises MistralcError where `most` are too few.
    """
    if not budget.measured:
        return most, measure([most])[most]
    low, high = 0, most  # the answer is from `low` to `high`, if there is one
    found: dict[int, Distance] = {}
    while True:
        tried = between(low, high)
        found |= measure([count for count in tried if count not in found])
        good = next((count for count in tried if budget.met(found[count])), None)
        if good is None:
            raise _unmet(budget, found[most], most)
        below = [count for count in tried if count < good]
        if not below or below[-1] == good - 1:
            return good, found[good]
        low, high = below[-1] + 1, good


def between(low: int, high: int) -> list[int]:
    """At most `TRIED` whole numbers from `low` to `high`, both among them, denser at the start."""
    steps = TRIED - 1
    return sorted({low + round((high - low) * (step / steps) ** 2) for step in range(steps + 1)})


def _unmet(budget: Budget, best: Distance, kept: int) -> MistralcError:
    wanted = []
    if budget.max_kl is not None:
        wanted.append(f"at most {budget.max_kl:g} nats of divergence")
    if budget.max_ppl_increase is not None:
        wanted.append(f"at most {budget.max_ppl_increase:.1%} more perplexity")
    return MistralcError(
        f"With {kept} groups in higher precision the model is {best.kl:.4g} nats a token from its "
        f"checkpoint, and its perplexity {expm1(best.nll_increase):+.1%}; {' and '.join(wanted)} "
        "was asked for. Allow more, give a larger --keep-share, or choose another precision."
    )


def keep_worst(
    recipe: Recipe, weight: Callable[[str], Tensor], samples: Samples, budget: Budget,
    state: Work, device: torch.device, stage: Stage,
) -> tuple[Recipe, dict[str, Any]]:  # fmt: skip
    """Return the recipe with the worst groups in higher precision, and what was measured.

    What each group costs is kept in the working directory, so another budget is soon tried.
    """
    spec = recipe.spec
    every = tuple(groups(spec))
    count = min(len(samples.ids), TEXTS)
    ids = spread(samples.ids, count)[:, :TEXT]
    higher = higher_precision(recipe)

    def measured(variants: Variants, rest: Scheme | None, title: str) -> dict[str, Distance]:
        with stage(title, spec.num_hidden_layers) as advance:
            return measure(recipe, weight, ids, variants, state.scratch("variants"), device,
                           rest=rest, advance=advance)  # fmt: skip

    def costs() -> dict[str, float]:
        found = measured(alone(spec), None, "Measuring each group")
        return {name: distance.kl for name, distance in sorted(found.items())}

    cost = state.remembered("sensitivity", costs)
    worst = worst_first(every, cost, budget.share)

    def keeping(counts: Sequence[int]) -> dict[int, Distance]:
        variants = {
            str(n): frozenset(g.name for g in every) - {g.name for g in worst[:n]} for n in counts
        }
        found = measured(variants, higher, "Measuring the whole")
        return {int(name): distance for name, distance in found.items()}

    chosen, distance = choose(len(worst), budget, keeping)
    names = [group.name for group in worst[:chosen]]
    return kept(recipe, names, higher), {
        "budget": asdict(budget), "groups": names, "kl": distance.kl,
        "ppl_increase": expm1(distance.nll_increase), "kl_alone": cost,
        "tokens": ids.numel(),
    }  # fmt: skip


def higher_precision(recipe: Recipe) -> Scheme | None:
    """What groups are kept as: 8 bits, inputs as they are; float where that is what they are."""
    better = default_scheme("int8wo", block=None)
    return None if better in recipe.schemes.values() else better
