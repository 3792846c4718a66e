"""Carry a checkpoint's own codes over: which scheme of a target holds them, and what is said of it.

A target stores codes in the forms that its backend computes with. The same codes often fit another
form without a change of any value: a scale for a whole row is repeated for each of its blocks, four
bits are stored in eight, a zero point becomes a minimum. `held` finds such a form; where there is
none, the weight is dequantized exactly and treated as a float one.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import gcd, prod

from graphs.build import Build
from graphs.dtypes import ELEMENT_TYPES
from graphs.precisions import PRECISIONS, Precision
from graphs.quant_scheme import BLOCKS, Offset, Scheme, groups
from graphs.spec import ModelSpec
from graphs.targets import Target

NBITS_BLOCKS = (16, 32, 64, 128, 256)
"""Block sizes of `MatMulNBits` (ONNX Runtime, `contrib_ops/cpu/quantization/matmul_nbits.cc`)."""

_OFFSETS: tuple[Offset, ...] = ("none", "zero_point", "minimum")  # each can express those before it


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCodes:
    """What a checkpoint says of one quantized weight, before it is read.

    `label` names the form. `scheme` holds its codes as they are, None if no scheme can, for the
    reason `not_held`. `scales` is the type that holds its scales and minimums without rounding.
    `rounds_inputs` says that the checkpoint's own runtime rounds inputs with scales of the moment.
    """

    label: str
    scheme: Scheme | None = None
    not_held: str = ""
    scales: str = "float32"
    rounds_inputs: bool = False


def held(scheme: Scheme, columns: int, target: Target, precision: Precision) -> Scheme | None:
    """Return the scheme in which `target` stores these codes unchanged, None if there is none."""
    if scheme.activation is not None:
        if precision.activation_codes == scheme.activation:
            return scheme
        scheme = replace(scheme, activation=None)
    if not ELEMENT_TYPES[scheme.codes].is_integer:
        fits = scheme.block is None or target.float8_blocks
        return scheme if target.weight_only_float8 and fits else None
    if target.weight_only_layout == "nbits":
        return _in_blocks(scheme, columns, NBITS_BLOCKS, partial=target.partial_blocks)
    if scheme.offset != "none":
        return None
    if scheme.codes == "int4":
        return _in_blocks(scheme, columns, BLOCKS, partial=target.partial_blocks)
    return scheme if scheme.block is None else None


def _in_blocks(
    scheme: Scheme, columns: int, sizes: Iterable[int], *, partial: bool
) -> Scheme | None:
    """Return the scheme with the largest block of `sizes` that its own is a multiple of."""
    partial = partial and scheme.offset != "minimum"  # whose sums need whole blocks
    fits = [
        size
        for size in sizes
        if (scheme.block is None or scheme.block % size == 0) and (partial or columns % size == 0)
    ]
    if scheme.block is None:
        fits = [size for size in fits if size in BLOCKS]
    return replace(scheme, block=max(fits)) if fits else None


def common(schemes: Iterable[Scheme | None]) -> Scheme | None:
    """Return one scheme that holds the codes of all: linears of a group share their scheme."""
    found = set(schemes)
    if len(found) == 1:
        return found.pop()
    known = [one for one in found if one is not None]
    if len(known) < len(found):
        return None
    codes = {one.codes for one in known}
    if len(codes) > 1 and not all(ELEMENT_TYPES[one].is_integer for one in codes):
        return None
    sizes = [one.block for one in known if one.block is not None]
    inputs = {one.activation for one in known}
    return Scheme(
        codes=max(codes, key=lambda name: ELEMENT_TYPES[name].bits),
        block=gcd(*sizes) if sizes else None,
        offset=max((one.offset for one in known), key=_OFFSETS.index),
        activation=inputs.pop() if len(inputs) == 1 else None,
    )


def carried_schemes(
    spec: ModelSpec, target: Target, precision: Precision, stored: Mapping[str, StoredCodes]
) -> dict[str, Scheme]:
    """Return the schemes of all linears of the layers whose codes fit the target, by weight."""
    shapes = spec.weight_shapes()
    result: dict[str, Scheme] = {}
    for group in groups(spec):
        names = [name for name in group.readers if name in stored]
        if len(names) < len(group.readers):
            continue
        scheme = common(stored[name].scheme for name in names)
        if scheme is None:
            continue
        fit = held(scheme, shapes[names[0]][1], target, precision)
        if fit is not None:
            result |= dict.fromkeys(names, fit)
    return result


def own_precision(
    spec: ModelSpec, target: Target, stored: Mapping[str, StoredCodes]
) -> Precision | None:
    """Return the precision in which the target carries most codes over, None if less than half."""
    shapes = spec.weight_shapes()
    linears = {name: prod(shapes[name]) for group in groups(spec) for name in group.readers}
    ranked: list[tuple[int, int, int, Precision]] = []
    for name in target.activations:
        one = PRECISIONS[name]
        if not one.quantized:
            continue
        schemes = carried_schemes(spec, target, one, stored)
        # By the stored codes: those of a group may have been widened to share a scheme.
        own = {n: scheme for n in schemes if (scheme := stored[n].scheme) is not None}
        alike = {n for n, scheme in own.items() if scheme.codes == one.codes}
        rounded = {n for n in alike if own[n].activation == schemes[n].activation}
        sizes = [sum(linears[n] for n in names) for names in (schemes, rounded, alike)]
        ranked.append((sizes[0], sizes[1], sizes[2], one))
    if not ranked:
        return None
    carried, _, alike_size, best = max(ranked, key=lambda rank: rank[:3])
    return best if 2 * carried >= sum(linears.values()) and alike_size else None


def describe_carried(build: Build, stored: Mapping[str, StoredCodes]) -> list[str]:
    """Say in sentences what becomes of the weights that the checkpoint stores as codes."""
    if not stored:
        return []
    schemes, copied = build.storage.schemes, set(build.storage.copied)
    kept: Counter[tuple[str, str]] = Counter()
    lost: Counter[tuple[str, str, str]] = Counter()
    for name, one in stored.items():
        if name in copied:
            kept[one.label, _kept_as(name, one, build)] += 1
        else:
            exact = build.activation == "float32"
            stored_as = f"{'stored as' if exact else 'rounded to'} {build.activation}"
            if name in schemes:
                stored_as = f"rounded to {schemes[name].codes}"
            lost[one.label, stored_as, _why_not(name, one, build)] += 1
    lines = [f"{count} weights of {label}: codes carried over bit for bit{how}"
             for (label, how), count in kept.items()]  # fmt: skip
    lines += [f"{count} weights of {label}: dequantized exactly and {how}{why}"
              for (label, how, why), count in lost.items()]  # fmt: skip
    rounded = [n for n in schemes if n not in stored and n not in copied]
    return lines + _describe_others(rounded, build)


def _describe_others(rounded: list[str], build: Build) -> list[str]:
    """Say which weights are rounded although the checkpoint stores them as floats."""
    heads = [name for name in rounded if not name.startswith("model.layers.")]
    lines = [f"the output layer: rounded to {build.storage.schemes[name].codes} "
             "(--keep lm_head stores it as it is)" for name in heads]  # fmt: skip
    if len(rounded) > len(heads):
        codes = sorted({build.storage.schemes[name].codes for name in rounded})
        count = len(rounded) - len(heads)
        lines.append(f"{count} weights of floats: rounded to {' and '.join(codes)}")
    return lines


def _kept_as(name: str, one: StoredCodes, build: Build) -> str:
    parts = []
    static = one.scheme is not None and one.scheme.activation is not None
    if build.storage.schemes[name].activation is not None:
        parts.append("inputs rounded with the checkpoint's scales")
    elif static or one.rounds_inputs:
        blocks = build.target.rounds_blocks and build.storage.layouts.get(name) == "nbits"
        how = "rounded to int8 block by block" if blocks else f"in {build.activation}, not rounded"
        parts.append(f"inputs {how}")
    if build.activation not in (one.scales, "float32"):
        parts.append(f"scales rounded from {one.scales} to {build.activation}")
    return "".join(f"; {part}" for part in parts)


def _why_not(name: str, one: StoredCodes, build: Build) -> str:
    if one.scheme is None:
        return f": {one.not_held}" if one.not_held else ""
    columns = build.spec.weight_shapes()[name][1]
    candidates = [PRECISIONS[p] for p in build.target.activations if PRECISIONS[p].quantized]
    if not any(held(one.scheme, columns, build.target, p) for p in candidates):
        return f": {build.target.title} has no form for these codes"
    return ""
