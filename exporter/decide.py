"""Decide a build: from a model's shape, a target and the user's options to one frozen value.

Reads no weights and writes nothing. `plan` and `export` both start here, so they accept and refuse
the same combinations.
"""

from collections.abc import Sequence
from dataclasses import replace

from exporter.checkpoint.config_hf import override_window
from exporter.checkpoint.open import has_weights, open_checkpoint, read_declared
from exporter.options import BuildOptions, QuantizeOptions
from exporter.quantization.carry import carried_schemes, held, own_precision
from exporter.quantization.make_recipe import weight_facts
from exporter.quantization.policy import (
    WeightFacts,
    fitting,
    layer_schemes,
    layouts,
    output_scheme,
)
from graphs.build import Build, Storage
from graphs.contract import GraphContract
from graphs.errors import UsageError
from graphs.precisions import PRECISIONS, Precision, quantized_precisions
from graphs.quant_scheme import Scheme
from graphs.spec import ModelSpec, RingSpec
from graphs.targets import TARGETS, Target

LARGEST_CONTEXT = 4096  # tokens of a model without a window, unless the user asks for more


NOTHING_KNOWN = WeightFacts()


def read_facts(source: str, lora: Sequence[str] = ()) -> tuple[ModelSpec, WeightFacts]:
    """A checkpoint's shape, and what its weight files say; config.json alone is enough.

    `lora` are the adapters that are merged into it.

    Raises MistralcError if the configuration, or a weight file that is there, cannot be read.
    """
    if not has_weights(source):
        declared = read_declared(source, lora)
        types = frozenset([declared.dtype] if declared.dtype else [])
        return declared.spec, WeightFacts(types=types, method=declared.method)
    checkpoint = open_checkpoint(source, lora)
    return checkpoint.spec, weight_facts(checkpoint)


def decide(
    spec: ModelSpec, target: Target, options: BuildOptions, facts: WeightFacts = NOTHING_KNOWN
) -> Build:
    """Make every choice that the options leave open. Raises UsageError if they do not fit."""
    options.check(target)
    if options.window is not None:
        spec = override_window(spec, options.window)
    _check_model(spec, target)
    context = decide_context(spec, options)
    if context is not None:
        spec = spec.within(context)
    ring = decide_ring(spec, target, options, context)
    if spec.rope_scaling is not None:
        context = None if spec.slides else ring.context
        spec = replace(spec, rope_scaling=spec.rope_scaling.for_context(context))
    precision = decide_precision(spec, target, options, facts)
    return Build(
        target=target,
        precision=precision,
        contract=GraphContract(spec=spec, ring=ring, activation=target.activation(precision.name)),
        storage=_storage(spec, target, precision, options.quantize, facts),
        window_source="checkpoint" if options.window is None else "user",
        batch_invariant=options.batch_invariant,
    )


def _check_model(spec: ModelSpec, target: Target) -> None:
    """Raise UsageError if the target cannot compute what the model needs."""
    if spec.attention.softcap is not None and not target.caps_scores:
        able = " or ".join(name for name, one in TARGETS.items() if one.caps_scores)
        raise UsageError(
            f"This model caps its attention scores at {spec.attention.softcap:g}, as Gemma 2 does, "
            f"and the attention of {target.title} takes no such cap, so --target {target.name} "
            f"cannot compute it exactly. Choose --target {able}."
        )


def decide_precision(
    spec: ModelSpec, target: Target, options: BuildOptions, facts: WeightFacts
) -> Precision:
    """The user's choice, or the one that keeps every bit of the checkpoint, or the default."""
    if options.precision is not None:
        return PRECISIONS[options.precision]
    own = None
    if facts.method is not None and facts.calibrated is None:
        own = own_precision(spec, target, facts.codes)
    return own or PRECISIONS[target.precision_for(facts.types)]


def decide_context(spec: ModelSpec, options: BuildOptions) -> int | None:
    """The longest text in tokens; None if every layer has a window that some text exceeds."""
    longest = max(size or 0 for size in spec.windows)
    if options.context is None:
        return None if spec.slides else min(spec.max_position_embeddings, LARGEST_CONTEXT)
    if spec.slides and options.context >= longest:
        raise UsageError(
            f"--context is {options.context}, but every layer of this checkpoint has a window of "
            f"{'' if len(spec.windows) == 1 else 'at most '}{longest} tokens, so there is no "
            "longest text. Leave it out, or give less than the window for a smaller ring."
        )
    if options.context > spec.max_position_embeddings:
        raise UsageError(
            f"--context is {options.context}; the checkpoint was trained for at most "
            f"{spec.max_position_embeddings} positions. Give at most that, or use --window."
        )
    return options.context


def decide_ring(
    spec: ModelSpec, target: Target, options: BuildOptions, context: int | None
) -> RingSpec:
    """Choose the ring. Small windows get small chunks, so that little of the ring is slack."""
    if context is None:  # no longest text: the number has no effect
        context = min(spec.max_position_embeddings, LARGEST_CONTEXT)
    smallest = min((size for size in spec.windows if size is not None), default=context)
    chunk = options.chunk or max(target.min_chunk, min(target.largest_default_chunk, smallest))
    if chunk < target.min_chunk:
        raise UsageError(
            f"--chunk is {chunk}; --target {target.name} needs at least {target.min_chunk}: "
            "TensorRT-RTX 1.7 fails to compile shorter steps. Leave it out, or give a larger one."
        )
    return RingSpec(chunk=chunk, context=context, max_batch=options.max_batch)


def _storage(
    spec: ModelSpec, target: Target, precision: Precision, options: QuantizeOptions,
    facts: WeightFacts,
) -> Storage:  # fmt: skip
    """How each weight is stored."""
    if not precision.quantized:
        if facts.calibrated is not None or options != QuantizeOptions():
            raise UsageError(
                f"The precision {precision.name} quantizes nothing, so --calibration, --block, "
                "--symmetric, --keep and the options of the output layer have no meaning. Leave "
                f"them out, or choose one of {', '.join(quantized_precisions())}."
            )
        return Storage()
    copied: list[str] = []
    if facts.calibrated is None:
        schemes = dict(layer_schemes(spec, target, precision, options))
        copied = _take_codes(spec, target, precision, schemes, options, facts)
    else:
        schemes = dict(facts.calibrated)
    head = output_scheme(spec, target, precision, options)
    if head is not None:
        name, scheme = head
        kept = _kept_head(spec, target, name, scheme, options, facts)
        schemes[name] = kept or scheme
        if kept is not None:
            copied.append(name)
    decided = facts.settled | set(copied)
    fitted = fitting(spec, target, schemes, decided=decided.__contains__)
    return Storage(schemes=fitted, layouts=layouts(spec, target, fitted), copied=tuple(copied))


def _take_codes(
    spec: ModelSpec, target: Target, precision: Precision, schemes: dict[str, Scheme],
    options: QuantizeOptions, facts: WeightFacts,
) -> list[str]:  # fmt: skip
    """Keep the checkpoint's codes where they match what was asked for; returns those weights.

    In the checkpoint's own precision all codes match, also those of other widths that a mixture has
    for some layers, and nothing else of a quantized directory is rounded. `schemes` is changed.
    """
    own = own_precision(spec, target, facts.codes)
    copied = []
    for name, scheme in carried_schemes(spec, target, precision, facts.codes).items():
        asked = schemes[name]
        alike = (scheme.codes, scheme.activation) == (asked.codes, asked.activation)
        if precision != own and not alike:
            continue
        if options.block not in (None, scheme.block) or (
            options.symmetric and scheme.offset != "none"
        ):
            continue
        schemes[name] = scheme
        copied.append(name)
    if precision == own and facts.method is not None:
        for name in schemes.keys() - set(copied):
            del schemes[name]  # a float, or codes that no scheme holds: stored as floats
    return copied


def _kept_head(
    spec: ModelSpec, target: Target, name: str, asked: Scheme, options: QuantizeOptions,
    facts: WeightFacts,
) -> Scheme | None:  # fmt: skip
    """Return the scheme of the output layer's own codes, None if they are not kept."""
    stored = facts.codes.get(name)
    if stored is None or stored.scheme is None or facts.calibrated is not None:
        return None
    scheme = held(stored.scheme, spec.weight_shapes()[name][1], target, PRECISIONS["int8wo"])
    if scheme is None or (spec.tie_word_embeddings and scheme.offset != "none"):
        return None  # rows of a tied embedding are looked up in codes without offsets
    if facts.method is None or options.head_block is not None or options.head_bits != 8:
        return scheme if scheme == asked else None
    return scheme
