"""How far quantized groups push the model's predictions from the checkpoint's. Decides nothing.

A variant is the model with some groups quantized as a table says, and the others in float or in a
scheme of higher precision. All variants go through a layer before the next one is loaded, so the
weights are read once however many there are; their states lie in a file between layers. What is
measured is the mean over tokens of the Kullback-Leibler divergence, in nats, of the variant's
next-token distribution from the checkpoint's.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from calib.layers.layer_pass import quantized_layer, run_layer, tensor_in_file
from exporter.decoder.model import load_decoder
from exporter.quantization.recipe import INPUT_SCALE, Recipe
from graphs.quant_scheme import SCALE, ZERO_POINT, Scheme, groups
from graphs.spec import ModelSpec

Variants = Mapping[str, frozenset[str]]  # the quantized groups of each, by any name
JUDGED = 256  # tokens whose predictions are compared


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """How far a variant is from the checkpoint: nats a token."""

    kl: float
    nll_increase: float  # of the mean negative log-likelihood of the text itself


def alone(spec: ModelSpec) -> Variants:
    """One variant for each group: it alone is quantized."""
    return {group.name: frozenset({group.name}) for group in groups(spec)}


def measure(
    recipe: Recipe, weight: Callable[[str], Tensor], ids: Tensor, variants: Variants,
    scratch: Path, device: torch.device, rest: Scheme | None = None,
    advance: Callable[[int], None] = lambda _layers: None,
) -> dict[str, Distance]:  # fmt: skip
    """Measure every variant on the texts `ids`, int64 [n, S]; returns them by name.

    `recipe` quantizes all groups; those that are not in a variant are stored as `rest`. `scratch`
    is a file that may be overwritten; it takes 4 n S E bytes a variant. `advance` is called with 1
    after every layer.
    """
    spec, names = recipe.spec, [None, *variants]
    scratch.unlink(missing_ok=True)
    states = tensor_in_file(scratch, len(names), *ids.shape, spec.hidden_size)
    states[0] = load_decoder(spec, weight, only={"model.embed_tokens"}).embed(ids)
    decoder = load_decoder(spec, weight, only=(), device=device)
    begun = 1  # variants are sorted by where they begin to differ; the rest still equal the first
    first = {name: _first_layer(quantized) if rest is None else 0
             for name, quantized in variants.items()}  # fmt: skip
    order = sorted(variants, key=first.__getitem__)
    for index in range(spec.num_hidden_layers):
        weights = {name: weight(name) for name in spec.weight_shapes()
                   if name.startswith(f"model.layers.{index}.")}  # fmt: skip
        own = {group.name for group in groups(spec) if group.layer == index}
        starting = [name for name in order[begun - 1 :] if first[name] == index]
        states[begun : begun + len(starting)] = states[0]
        begun += len(starting)
        reference = kept(recipe, own, None)
        chosen = [None, *(variants[name] & own for name in order[: begun - 1])]
        for subset in dict.fromkeys(chosen):
            as_stored = reference if subset is None else kept(recipe, own - subset, rest)
            layer = quantized_layer(as_stored, index, weights.__getitem__, device)
            for number, mine in enumerate(chosen):
                if mine == subset:
                    states[number] = run_layer(decoder, layer, states[number].to(device)).cpu()
        advance(1)
    distances = _compare(recipe, weight, ids, states, device)
    scratch.unlink()
    return dict(zip(order, distances, strict=True))


def _first_layer(quantized: frozenset[str]) -> int:
    return min((int(name.split(".")[2]) for name in quantized), default=0)


def kept(recipe: Recipe, names: Collection[str], scheme: Scheme | None) -> Recipe:
    """The recipe with the groups `names` stored as `scheme`, to the nearest; None is float.

    All smoothing stays: by itself it changes nothing.
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
    step = max(1, count * (length - 1) // JUDGED)
    rows = torch.arange(0, count * length, step)
    rows = rows[rows % length < length - 1]  # the last token of a text predicts nothing known
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
