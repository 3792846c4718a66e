"""Read the blocks of a GGUF file as codes and scales, so nothing is rounded a second time.

`MatMulNBits` can compute with three of GGUF's block types exactly, 32 weights to a block. Layouts
from ggml's `ggml-common.h` (block_q4_0, block_q4_1, block_q8_0): `d` is the scale, `m` the minimum,
both float16; the low halves of the sixteen bytes `qs` are the first sixteen codes, the high halves
the others:

    Q4_0    d, qs[16]       weight = d (code - 8)
    Q4_1    d, m, qs[16]    weight = d code + m
    Q8_0    d, qs[32]       weight = d code, signed
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from exporter.checkpoint import weight_names
from exporter.checkpoint.open import Checkpoint
from exporter.checkpoint.stored import map_bytes
from exporter.quantization.rounding import Quantized
from graphs.quant_scheme import Scheme

SIZE = 32  # weights of a block
SCHEMES = {
    "Q4_0": Scheme(codes="int4", block=SIZE),
    "Q4_1": Scheme(codes="int4", block=SIZE, offset="minimum"),
    "Q8_0": Scheme(codes="int8", block=SIZE),
}


def block_scheme(dtype: str) -> Scheme | None:
    """The scheme that stores blocks of a GGUF type exactly; None if there is none."""
    return SCHEMES.get(dtype)


def read_blocks(checkpoint: Checkpoint, name: str) -> Callable[[], Quantized]:
    """Return a function that reads one weight's blocks; rows are in Hugging Face's order."""
    return partial(_read, checkpoint, name)


def _read(checkpoint: Checkpoint, name: str) -> Quantized:
    stored = checkpoint.stored[name]
    rows, columns = stored.shape
    blocks = map_bytes(stored.where).view(rows, columns // SIZE, -1)  # [N, J, bytes]
    heads = checkpoint.interleaved_heads(name)
    if heads is not None:
        blocks = weight_names.to_half_split(blocks.flatten(1), heads).view(blocks.shape)
    scheme = SCHEMES[stored.where.dtype]
    scale = _float16(blocks[..., :2])
    if scheme.codes == "int8":
        codes = blocks[..., 2:].contiguous().view(torch.int8)
        return Quantized(scheme=scheme, codes=codes.view(rows, columns), scale=scale)
    packed = blocks[..., -SIZE // 2 :]
    unsigned = torch.cat([packed & 0xF, packed >> 4], dim=-1)  # [N, J, 32]
    codes = (unsigned.to(torch.int8) - 8).view(rows, columns)
    if scheme.offset == "none":
        return Quantized(scheme=scheme, codes=codes, scale=scale)
    minimum = _float16(blocks[..., 2:4]) + 8 * scale
    return Quantized(scheme=scheme, codes=codes, scale=scale, minimum=minimum)


def _float16(data: Tensor) -> Tensor:
    """Read two bytes of each block as float16; returns float32 [N, J]."""
    return data.contiguous().view(torch.float16).squeeze(-1).float()
