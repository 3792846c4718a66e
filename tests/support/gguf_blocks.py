"""Random blocks of every GGUF type that has codes; the gguf package quantizes to few of them."""

from typing import Any

import gguf
import numpy as np

from exporter.checkpoint.quantized.gguf_blocks import BLOCKS

Array = np.ndarray[Any, Any]
_HALF = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
         "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
         "IQ4_NL": (0,), "IQ4_XS": (0,), "TQ2_0": (64,)}  # fmt: skip
"""Where the float16 numbers of a block lie: any bits would do, but for NaN and infinity."""


def random_blocks(kind: str, rows: int, columns: int, seed: int = 0, size: float = 0.01) -> Array:
    """Return random rows [N, bytes] of this type. Scales are around `size`."""
    random = np.random.default_rng(seed)
    block, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    data = random.integers(0, 256, (rows * columns // block, width), np.uint8)
    for at in _HALF.get(kind, ()):
        scales = random.uniform(0.5, 1.5, len(data)) * size
        data[:, at : at + 2] = scales.astype(np.float16)[:, None].view(np.uint8)
    if kind == "MXFP4":  # a power of two
        data[:, 0] = random.integers(118, 122, len(data))
    if kind == "NVFP4":  # 127 is NaN
        data[:, :4] = random.integers(1, 40, (len(data), 4))
    return data.reshape(rows, -1)


KINDS = tuple(BLOCKS)
