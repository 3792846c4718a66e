"""What one step of an engine reads and writes, in bytes, from TensorRT's list of its layers.

Every kernel reads its inputs and constants and writes its outputs, so the sum over the kernels of a
profile is what a step moves at least. Letters as in `graphs/spec.py`.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from exporter.engine.layers import EngineTensor, LayerInfo
from graphs.contract import GraphContract

ATTENTION = ("mha", "flash")  # in the names of fused attention kernels
MOVES = frozenset(
    ("Cast", "Conc", "Copy", "Expa", "Gath", "Move", "Pad", "Repl", "Resh", "Scat", "Slic", "Spli",
     "Sque", "Tile", "Tran", "Unsq")
)  # fmt: skip
"""What a generated kernel does that computes nothing: the abbreviations in its name."""
COPIES = ("copy", "reformat", "runtime_function")  # kinds of layers that only move data


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A step of one row: `tokens`, and the largest number of `slots` that a mask may cover."""

    tokens: int
    contract: GraphContract

    @property
    def slots(self) -> int:
        """Slots of the largest ring, and what a prompt appends behind it."""
        return max(self.contract.capacities.values()) + self.tokens - 1

    def nbytes(self, tensor: EngineTensor) -> int:
        """Bytes of a tensor in this step.

        TensorRT does not say what an open axis stands for. By its place it is one row, the tokens,
        all query heads, or the slots; in doubt the larger.
        """
        spec, shape = self.contract.spec, list(tensor.shape)
        rank = len(shape)
        for axis in (i for i, size in enumerate(shape) if size < 0):
            if axis == 0 and rank == 3 and shape[-1] == spec.head_dim:
                shape[axis] = spec.num_attention_heads
            elif axis == 0 and rank > 2:
                shape[axis] = 1
            elif rank == 4 and (axis == 3 or shape[1] == spec.num_key_value_heads):
                shape[axis] = self.slots if self.tokens > 1 else 1
            else:
                shape[axis] = self.tokens
        return -(-prod(shape) * tensor.bits // 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes that a step of `tokens` reads and writes, over all kernels.

    `weights` counts constants, of the embedding only the rows that are looked up. `cache` is what
    attention reads of the ring and what the step writes to it. `moved` is the traffic of kernels
    that compute nothing: copies, reformats, casts, gathers, weights written out in another type.
    `activations` is everything else. `movers` splits `moved` by kernel.
    """

    tokens: int
    kernels: int
    weights: int
    cache: int
    activations: int
    moved: int
    movers: Mapping[str, int]

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.activations + self.moved


def measure(layers: Iterable[LayerInfo], contract: GraphContract, tokens: int) -> Traffic:
    """Add up what the layers of one profile read and write in a step of `tokens` of one row."""
    step = Step(tokens=tokens, contract=contract)
    kernels, weights, cache, activations = 0, 0, 0, 0
    movers: Counter[str] = Counter()
    for layer in layers:
        if not (layer.inputs or layer.outputs):
            continue  # signals between streams
        kernels += 1
        constants = sum(_constant_bytes(layer, one, step) for one in layer.constants)
        rings, others = _split(layer, step)
        if moves(layer):
            movers[layer.family] += constants + rings + others
        else:
            weights, cache, activations = weights + constants, cache + rings, activations + others
    return Traffic(
        tokens=tokens, kernels=kernels, weights=weights, cache=cache, activations=activations,
        moved=sum(movers.values()), movers=dict(movers.most_common()),
    )  # fmt: skip


def attends(layer: LayerInfo) -> bool:
    """Whether a layer is a fused attention kernel."""
    return any(word in layer.name.lower() for word in ATTENTION)


def moves(layer: LayerInfo) -> bool:
    """Whether a layer computes nothing that the model asks for."""
    if layer.kind in COPIES or copied_caches(layer) or dequantized(layer):
        return True
    operations = layer.operations
    return bool(operations) and MOVES.issuperset(operations) and not updated_caches(layer)


def is_cache(tensor: EngineTensor) -> bool:
    """Whether a tensor is a ring of the graph contract."""
    return tensor.name.startswith(("past_", "present_"))


def updated_caches(layer: LayerInfo) -> set[str]:
    """Names of the rings that a layer writes where they lie."""
    written = {tensor.name for tensor in layer.outputs if is_cache(tensor)}
    return written & {tensor.name for tensor in layer.inputs}


def copied_caches(layer: LayerInfo) -> set[str]:
    """Names of the rings that a layer writes out elsewhere."""
    if attends(layer):
        return set()
    return {t.name for t in layer.inputs if is_cache(t)} - updated_caches(layer)


def dequantized(layer: LayerInfo) -> list[EngineTensor]:
    """The quantized weights that a layer writes out whole in a wider type."""
    wide = {tensor.count for tensor in layer.outputs if tensor.bits >= 16}
    return [
        tensor for tensor in layer.constants
        if tensor.bits <= 8 and len(tensor.layout[1]) > 1 and tensor.count in wide
    ]  # fmt: skip


def _constant_bytes(layer: LayerInfo, tensor: EngineTensor, step: Step) -> int:
    spec = step.contract.spec
    looked_up = any(one.name == "input_ids" for one in layer.inputs)
    if looked_up and tensor.shape == (spec.vocab_size, spec.hidden_size):
        return tensor.nbytes // spec.vocab_size * step.tokens
    return tensor.nbytes


def _split(layer: LayerInfo, step: Step) -> tuple[int, int]:
    """Bytes of rings, and bytes of all other inputs and outputs."""
    rings, others, updated = 0, 0, updated_caches(layer)
    for tensor in (*layer.inputs, *layer.outputs):
        nbytes = step.nbytes(tensor)
        if not is_cache(tensor):
            others += nbytes
        elif tensor.name not in updated:
            rings += nbytes
    written = step.contract.slot_bytes // 2 * step.tokens  # a key or a value
    return rings + written * len(updated), others
