"""The sliding window and the ring, as arithmetic. Knows nothing about tensors or files.

Only Python's operators are used, so the traced PyTorch graph, NumPy and plain integers share
this one truth. Worked example with window W=4, chunk=3, hence C=6 slots:

    after positions 0..5    slots hold  0  1  2  3  4  5
    writing 6, 7, 8         slots hold  6  7  8  3  4  5     slot = position mod 6
    query 6 sees            3 4 5 6     0 <= 6 - k < 4
    query 8 sees            5 6 7 8

Query 6 still finds key 3 although 7 and 8 were written before it attended: that is what the
chunk - 1 slots beyond the window are for.
"""

from collections.abc import Iterable, Iterator
from typing import Any

# `Any` stands for int, numpy.ndarray or torch.Tensor: whatever has the operators.


def visible(q: Any, k: Any, window: int | None) -> Any:
    """Whether the query at position `q` sees the key at position `k`; a negative `k` is empty.

    `window` keys are seen, the query's own included (the meaning of `sliding_window` in
    Hugging Face transformers and in Mistral's reference code). None sees the whole past.
    """
    seen = (k >= 0) & (q - k >= 0)
    return seen if window is None else seen & (q - k < window)


def slot_position(last: Any, slot: Any, capacity: Any) -> Any:
    """The position that `slot` holds once position `last` is written; negative means empty.

    `capacity` is added before the remainder so that no operand is negative: C, ONNX, NumPy and
    Python disagree about the sign of a negative remainder.
    """
    return last - (last - slot + capacity) % capacity


def capacity(window: int, chunk: int) -> int:
    """Slots that a window needs when `chunk` tokens are written before they attend.

    The least is `window + chunk - 1`; rounded up to a multiple of `chunk`, so that whole chunks
    never cross the ring's end: W=4096, chunk=512 gives 4608.
    """
    return -(-(window + chunk - 1) // chunk) * chunk


def pieces(position: int, count: int, chunk: int, capacities: Iterable[int]) -> Iterator[int]:
    """Cut `count` tokens from `position` on into steps that no ring's end interrupts.

    Yields the length of each step. With chunk=3 and C=6, seven tokens from position 4 on
    become 2, 3, 2: slots 4..5, 0..2, 3..4.
    """
    rings = tuple(capacities)
    while count > 0:
        step = min(chunk, count, *(ring - position % ring for ring in rings))
        yield step
        position += step
        count -= step


def oldest_rewind(position: int, window: int | None, capacity: int) -> int:
    """The earliest position that a ring whose next position is `position` can go back to.

    Going back to r is exact while no key that r's window needs was overwritten, and while no
    slot left over from the future is mistaken for an old one: r - W + 1 >= position - C. Before
    the first wrap nothing was overwritten and everything is allowed.
    """
    if position <= capacity or window is None:
        return 0
    return position - capacity + window - 1
