"""Decide a build: from a model's shape, a target and the user's options to one frozen value.

Reads no weights and writes nothing. `plan` and `export` both start here, so they accept and refuse
the same combinations.
"""

from exporter.checkpoint.config_hf import override_window
from exporter.checkpoint.open import declared_type, has_weights, open_checkpoint, read_spec
from exporter.options import BuildOptions, QuantizeOptions
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
from graphs.quant_scheme import Scheme, groups
from graphs.spec import ModelSpec, RingSpec
from graphs.targets import Target

LARGEST_CONTEXT = 4096  # tokens of a model without a window, unless the user asks for more


NOTHING_KNOWN = WeightFacts()


def read_facts(source: str) -> tuple[ModelSpec, WeightFacts]:
    """A checkpoint's shape, and what its weight files say; config.json alone is enough.

    Raises MistralcError if the configuration, or a weight file that is there, cannot be read.
    """
    if not has_weights(source):
        declared = declared_type(source)
        return read_spec(source), WeightFacts(types=frozenset([declared] if declared else []))
    checkpoint = open_checkpoint(source)
    return checkpoint.spec, weight_facts(checkpoint)


def decide(
    spec: ModelSpec, target: Target, options: BuildOptions, facts: WeightFacts = NOTHING_KNOWN
) -> Build:
    """Make every choice that the options leave open. Raises UsageError if they do not fit."""
    options.check(target)
    if options.window is not None:
        spec = override_window(spec, options.window)
    ring = decide_ring(spec, target, options)
    precision = decide_precision(target, options, facts)
    return Build(
        target=target,
        precision=precision,
        contract=GraphContract(spec=spec, ring=ring, activation=target.activation(precision.name)),
        storage=_storage(spec, target, precision, options.quantize, facts),
        window_source="checkpoint" if options.window is None else "user",
        batch_invariant=options.batch_invariant,
    )


def decide_precision(target: Target, options: BuildOptions, facts: WeightFacts) -> Precision:
    """The user's choice, or the one that keeps every bit of the checkpoint, or the default."""
    return PRECISIONS[options.precision or target.precision_for(facts.types)]


def decide_ring(spec: ModelSpec, target: Target, options: BuildOptions) -> RingSpec:
    """Choose the ring. Small windows get small chunks, so that little of the ring is slack."""
    context = options.context or min(spec.max_position_embeddings, LARGEST_CONTEXT)
    if options.context is not None and spec.slides:
        raise UsageError(
            f"--context is {options.context}, but every layer of this checkpoint has a window of "
            f"{spec.windows[0]} tokens, so there is no longest text. Leave it out."
        )
    if context > spec.max_position_embeddings:
        raise UsageError(
            f"--context is {context}; the checkpoint was trained for at most "
            f"{spec.max_position_embeddings} positions. Give at most that, or use --window."
        )
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
        if target.keeps_gguf_blocks:
            copied = _take_blocks(spec, target, schemes, options, facts)
    else:
        schemes = dict(facts.calibrated)
    head = output_scheme(spec, target, precision, options)
    if head is not None:
        name, scheme = head
        schemes[name] = scheme
        if facts.blocks.get(name) == scheme:
            copied.append(name)
    fitted = fitting(spec, target, schemes, decided=facts.settled.__contains__)
    return Storage(schemes=fitted, layouts=layouts(spec, target, fitted), copied=tuple(copied))


def _take_blocks(
    spec: ModelSpec, target: Target, schemes: dict[str, Scheme], options: QuantizeOptions,
    facts: WeightFacts,
) -> list[str]:  # fmt: skip
    """Keep a GGUF file's blocks where they match what was asked for; returns those weights.

    `schemes` is changed: the file's own scheme may have minimums, where the target has offsets.
    """
    copied = []
    symmetric = options.symmetric or not target.zero_points
    for group in groups(spec):
        found = {facts.blocks.get(name) for name in group.readers}
        scheme = found.pop()
        asked = schemes[group.readers[0]]
        if found or scheme is None or (scheme.codes, scheme.block) != (asked.codes, asked.block):
            continue
        if symmetric and scheme.offset != "none":
            continue
        for name in group.readers:
            schemes[name] = scheme
            copied.append(name)
    return copied
