"""Validate a step before it is sent to the device. Knows no device.

TensorRT silently drops a cache update that crosses the ring's end, and an index out of range reads
unrelated memory: the logits would be wrong without an error. With chunk=3 and C=6, a step of two
tokens at position 4 writes slots 4 and 5. At position 5 it would write slots 5 and 6, and there is
no slot 6.
"""

from collections.abc import Mapping

from graphs.errors import MistralcError
from graphs.spec import ModelSpec, RingSpec
from runtime.backends.session import Ids

_REMEDY = "Cut the tokens as runtime.decoding.ring.Ring.pieces does."


def check_step(
    spec: ModelSpec,
    ring: RingSpec,
    batch: int,
    ids: Ids,
    positions: Ids,
    indices: Ids,
    first: int = 0,
) -> None:
    """Raise MistralcError unless every row of the step [B, S] fits into the ring and the chunk.

    Each row's positions [B, S] must be consecutive, and `indices` [B, T] must be below S.
    """
    rows, count = ids.shape
    if first or rows != batch or positions.shape != ids.shape or indices.shape[:1] != (batch,):
        raise MistralcError(
            f"A step got tokens {ids.shape}, positions {positions.shape} and logits indices "
            f"{indices.shape} from row {first} on; this session takes {batch} rows from row 0 on, "
            "with a position for each token. Open another session for another batch."
        )
    if not 1 <= count <= ring.chunk or not 1 <= indices.shape[1] <= ring.chunk:
        raise MistralcError(
            f"A step got {count} tokens and {indices.shape[1]} rows of logits; 1 to {ring.chunk} "
            f"of each are expected, the bundle's chunk. {_REMEDY}"
        )
    _check_range("token", ids, spec.vocab_size)
    _check_range("logits index", indices, count)
    for row, first in enumerate(positions[:, 0].tolist()):
        if first < 0 or (count > 1 and bool((positions[row, 1:] - positions[row, :-1] != 1).any())):
            raise MistralcError(
                f"Row {row} of a step got the positions {positions[row].tolist()[:8]}; consecutive "
                f"ones from 0 up are expected. {_REMEDY}"
            )
        for window in spec.windows:
            _check_slots(row, first, count, window, ring.capacity(window))


def check_capacities(spec: ModelSpec, ring: RingSpec, capacities: Mapping[int | None, int]) -> None:
    """Raise MistralcError unless these are the full capacities: a device's ring never grows."""
    full = {window: ring.capacity(window) for window in spec.windows}
    if dict(capacities) != full:
        raise MistralcError(
            f"A ring of {_slots(capacities)} slots was asked for; this session's ring has "
            f"{_slots(full)} from the start and does not change. Use "
            "Ring(spec, ring, grows=False)."
        )


def _check_slots(row: int, first: int, count: int, window: int | None, capacity: int) -> None:
    slot = first if window is None else first % capacity  # without a window a ring never wraps
    if slot + count > capacity:
        raise MistralcError(
            f"Row {row} of a step would write {count} tokens from position {first} on, to slots "
            f"{slot} to {slot + count - 1} of a ring that has {capacity} slots: the end is crossed "
            f"and keys would be lost. {_REMEDY}"
        )


def _check_range(what: str, values: Ids, end: int) -> None:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= end:
        raise MistralcError(
            f"A step got the {what} {low if low < 0 else high}; 0 to {end - 1} are expected. "
            "Nothing was computed. Check where the value came from."
        )


def _slots(capacities: Mapping[int | None, int]) -> str:
    return " and ".join(map(str, capacities.values()))
