"""Measure how much quantized groups change the model's predictions. Decides nothing.

A variant is the model with some groups quantized by a table, and the others in float or in a scheme
of higher precision. All variants pass through a layer before the next layer is loaded, so weights
are read once for any number of variants; their states are kept in a file. The measure is the
Kullback-Leibler divergence, in nats per token, of the variant's next-token distribution from the
checkpoint's.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from calib.layers.layer_pass import quantized_layer, run_layer, tensor_in_file
from exporter.decoder.load import load_decoder
from exporter.quantization.recipe import INPUT_SCALE, Recipe
from graphs.quant_scheme import SCALE, ZERO_POINT, Scheme, groups
from graphs.spec import ModelSpec

Variants = Mapping[str, frozenset[str]]  # variant name: names of its quantized groups
COMPARED_TOKENS = 256  # whose predictions are compared


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """Distance of a variant from the checkpoint, in nats per token."""

    kl: float
    nll_increase: float  # of the text's mean negative log-likelihood


def each_group_alone(spec: ModelSpec) -> Variants:
    """Return one variant per group, in which only that group is quantized."""
    return {group.name: frozenset({group.name}) for group in groups(spec)}


def measure_variants(
    recipe: Recipe, weight: Callable[[str], Tensor], ids: Tensor, variants: Variants,
    scratch: Path, device: torch.device, rest: Scheme | None = None,
    advance: Callable[[int], None] = lambda _layers: None,
) -> dict[str, Distance]:  # fmt: skip
    """Measure every variant on the texts `ids`, int64 [n, S]; returns distances by variant name.

    `recipe` quantizes all groups; groups that are not in a variant are stored as `rest`, or in
    float if it is None. `scratch` is a file that is overwritten; it takes 4 n S E bytes per
    variant. `advance` is called with 1 after every layer.
    """
    spec = recipe.spec
    scratch.unlink(missing_ok=True)
    states = tensor_in_file(scratch, 1 + len(variants), *ids.shape, spec.hidden_size)
    # states [1 + variants, n, S, E]: first the checkpoint's, then the variants' in `order`
    states[0] = load_decoder(spec, weight, only={"model.embed_tokens"}).embed(ids)
    decoder = load_decoder(spec, weight, only=(), device=device)
    first = {name: _first_layer(changed) if rest is None else 0
             for name, changed in variants.items()}  # fmt: skip
    order = sorted(variants, key=first.__getitem__)  # a variant equals states[0] up to `first`
    begun = 1  # states that are computed separately so far
    for index in range(spec.num_hidden_layers):
        weights = {name: weight(name) for name in spec.weight_shapes()
                   if name.startswith(f"model.layers.{index}.")}  # fmt: skip
        own = {group.name for group in groups(spec) if group.layer == index}
        starting = [name for name in order[begun - 1 :] if first[name] == index]
        states[begun : begun + len(starting)] = states[0]
        begun += len(starting)
        reference = with_groups_stored_as(recipe, own, None)
        quantized = [None, *(variants[name] & own for name in order[: begun - 1])]
        for subset in dict.fromkeys(quantized):  # equal layers are built once
            as_stored = (
                reference if subset is None else with_groups_stored_as(recipe, own - subset, rest)
            )
            layer = quantized_layer(as_stored, index, weights.__getitem__, device)
            for number, mine in enumerate(quantized):
                if mine == subset:
                    states[number] = run_layer(decoder, layer, states[number].to(device)).cpu()
        advance(1)
    distances = _compare(recipe, weight, ids, states, device)
    scratch.unlink()
    return dict(zip(order, distances, strict=True))


def _first_layer(quantized: frozenset[str]) -> int:
    return min((int(name.split(".")[2]) for name in quantized), default=0)


def with_groups_stored_as(recipe: Recipe, names: Collection[str], scheme: Scheme | None) -> Recipe:
    """Return the recipe with the groups `names` stored as `scheme`, or in float if it is None.

    Their codes are rounded to nearest. Smoothing stays, since by itself it changes nothing.
    """
    readers = {n for group in groups(recipe.spec) if group.name in names for n in group.readers}
    schemes = {n: s for n, s in recipe.schemes.items() if n not in readers}
    if scheme is not None:
        schemes |= dict.fromkeys(sorted(readers), scheme)
    dropped = {name + part for name in readers for part in ("", SCALE, ZERO_POINT)}
    dropped |= {name + INPUT_SCALE for name in names}
    tensors = {name: value for name, value in recipe.tensors.items() if name not in dropped}
    return replace(recipe, schemes=schemes, tensors=tensors)


def _compare(
    recipe: Recipe, weight: Callable[[str], Tensor], ids: Tensor, states: Tensor,
    device: torch.device,
) -> list[Distance]:  # fmt: skip
    decoder = load_decoder(recipe.spec, weight, only={"model.norm", "lm_head"}, device=device)
    count, length = ids.shape
    step = max(1, count * (length - 1) // COMPARED_TOKENS)
    rows = torch.arange(0, count * length, step)  # [T]
    rows = rows[rows % length < length - 1]  # a text's last token has no next token
    target = ids.flatten()[rows + 1].to(device)

    def log_probabilities(state: Tensor) -> Tensor:
        chosen = state.flatten(0, 1)[rows].to(device)  # [T, E]
        return decoder.logits(chosen).log_softmax(-1)  # [T, V]

    ideal = log_probabilities(states[0])
    likely = ideal.exp()
    found = []
    for state in states[1:]:
        got = log_probabilities(state)
        kl = (likely * (ideal - got)).sum(-1).mean(dtype=torch.float64)
        loss = (ideal - got).gather(-1, target[:, None]).mean(dtype=torch.float64)
        found.append(Distance(kl=float(kl), nll_increase=float(loss)))
    return found
