"""Convert a backend's logits to float32. Knows bytes, not devices.

NumPy has no bfloat16 and needs none: a bfloat16 is the upper half of the float32 of equal value.
"""

import numpy as np
from numpy.typing import NDArray

from graphs.dtypes import Dtype


def to_float32(raw: NDArray[np.uint8], activation: Dtype, out: NDArray[np.float32]) -> None:
    """Convert `raw`, little-endian numbers of type `activation`, to float32 in `out` [n].

    The conversion is exact, since float32 holds every float16 and bfloat16. Allocates nothing.
    """
    if activation == "bfloat16":
        bits = raw.view("<u2")
        np.left_shift(bits, 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        np.copyto(out, raw.view("<f2" if activation == "float16" else "<f4"))
