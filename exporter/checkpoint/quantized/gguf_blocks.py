"""Read the blocks of a GGUF file as codes and scales, so nothing is rounded a second time.

Layouts from ggml's `ggml-common.h` (block_q4_0, block_q4_1, block_q8_0): `d` is the scale, `m` the
minimum, both float16; the low halves of the sixteen bytes `qs` are the first sixteen codes, the
high halves the others:

    Q4_0    d, qs[16]       weight = d (code - 8)
    Q4_1    d, m, qs[16]    weight = d code + m
    Q8_0    d, qs[32]       weight = d code, signed
"""

import torch
from torch import Tensor

from exporter.checkpoint.gguf_file import dequantize
from exporter.checkpoint.quantized.value import Quantized
from exporter.checkpoint.stored import StoredTensor, map_bytes
from exporter.checkpoint.weight_source import WeightSource
from graphs.quant_scheme import Scheme

SIZE = 32  # weights of a block
SCHEMES = {
    "Q4_0": Scheme(codes="int4", block=SIZE),
    "Q4_1": Scheme(codes="int4", block=SIZE, offset="minimum"),
    "Q8_0": Scheme(codes="int8", block=SIZE),
}


def block_source(stored: StoredTensor) -> WeightSource:
    """Return the source of a tensor of any block type, with codes if a scheme holds them."""
    scheme = SCHEMES.get(stored.where.dtype) if len(stored.shape) == 2 else None
    return WeightSource(
        name=stored.name,
        shape=stored.shape,
        dtype=stored.where.dtype,
        ranges=(stored.where,),
        read_rows=lambda start, stop: dequantize(stored, start, stop),
        by_rows=True,
        scales="float16" if scheme is not None and scheme.offset == "none" else "float32",
        scheme=scheme,
        read_codes=None if scheme is None else lambda a, b: _read(stored, scheme, a, b),
    )


def _read(stored: StoredTensor, scheme: Scheme, start: int, stop: int) -> Quantized:
    rows, columns = stored.shape
    blocks = map_bytes(stored.where).view(rows, columns // SIZE, -1)[start:stop]  # [n, J, bytes]
    rows = stop - start
    scale = _float16(blocks[..., :2])
    if scheme.codes == "int8":
        codes = blocks[..., 2:].contiguous().view(torch.int8)
        return Quantized(scheme=scheme, codes=codes.view(rows, columns), scale=scale)
    packed = blocks[..., -SIZE // 2 :]
    unsigned = torch.cat([packed & 0xF, packed >> 4], dim=-1)  # [n, J, 32]
    codes = (unsigned.to(torch.int8) - 8).view(rows, columns)
    if scheme.offset == "none":
        return Quantized(scheme=scheme, codes=codes, scale=scale)
    minimum = _float16(blocks[..., 2:4]) + 8 * scale
    return Quantized(scheme=scheme, codes=codes, scale=scale, minimum=minimum)


def _float16(data: Tensor) -> Tensor:
    """Read two bytes of each block as float16; returns float32 [n, J]."""
    return data.contiguous().view(torch.float16).squeeze(-1).float()
