"""Read the blocks of a GGUF file as codes and scales, so nothing is rounded a second time.

A block holds codes, scales and maybe minimums, packed in a dozen ways. The gguf package knows how;
it computes `scale * code + minimum`. So each of the three is what it computes once the other two
are overwritten by constants: with scales of 1 and minimums of 0 it returns the codes, with codes of
1 the scales, with codes of 0 the minimums. The places are those of the structs in ggml's
`ggml-common.h`; the constants are what its bit fields hold for these numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from exporter.checkpoint.gguf_file import block_size, dequantize, dequantize_rows
from exporter.checkpoint.quantized.value import Quantized
from exporter.checkpoint.stored import StoredTensor, map_bytes
from exporter.checkpoint.weight_source import DECODED_AT_ONCE, WeightSource
from graphs.quant_scheme import Scheme

Fields = tuple[tuple[int, bytes], ...]  # places in a block, and what to write there
ONE = b"\x00\x3c"  # in float16
ZERO = b"\x00\x00"


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """How codes of one block type are held, and where its parts lie.

    `unit_scales` makes all scales 1 and all minimums 0; `unit_codes` makes all codes 1 and all
    minimums 0; `zero_codes` makes all codes 0 and leaves the minimums. Codes that would not fit
    their type are stored `shift` lower. `scales` is the type that holds all scales.
    """

    scheme: Scheme
    unit_scales: Fields
    unit_codes: Fields
    zero_codes: Fields = ()
    shift: int = 0
    scales: str = "float32"


def _scheme(codes: str, block: int, *, minimum: bool = False) -> Scheme:
    return Scheme(codes="int4" if codes == "int4" else "int8", block=block,
                  offset="minimum" if minimum else "none")  # fmt: skip


_K_SCALES = b"\x01" * 4 + b"\x00" * 4 + b"\x01" * 4  # eight scales of 1 and minimums of 0, 6 bits

BLOCKS: Mapping[str, Blocks] = {
    "Q4_0": Blocks(scheme=_scheme("int4", 32), scales="float16", unit_scales=((0, ONE),),
                   unit_codes=((2, b"\x99" * 16),)),
    "Q4_1": Blocks(scheme=_scheme("int4", 32, minimum=True), shift=8,
                   unit_scales=((0, ONE + ZERO),), unit_codes=((2, ZERO + b"\x11" * 16),),
                   zero_codes=((4, b"\x00" * 16),)),
    "Q5_0": Blocks(scheme=_scheme("int8", 32), scales="float16", unit_scales=((0, ONE),),
                   unit_codes=((2, b"\xff" * 4 + b"\x11" * 16),)),
    "Q5_1": Blocks(scheme=_scheme("int8", 32, minimum=True), unit_scales=((0, ONE + ZERO),),
                   unit_codes=((2, ZERO + b"\x00" * 4 + b"\x11" * 16),),
                   zero_codes=((4, b"\x00" * 20),)),
    "Q8_0": Blocks(scheme=_scheme("int8", 32), scales="float16", unit_scales=((0, ONE),),
                   unit_codes=((2, b"\x01" * 32),)),
    "Q2_K": Blocks(scheme=_scheme("int4", 16, minimum=True),
                   unit_scales=((0, b"\x01" * 16), (80, ONE + ZERO)),
                   unit_codes=((16, b"\x55" * 64), (82, ZERO)),
                   zero_codes=((16, b"\x00" * 64),)),
    "Q3_K": Blocks(scheme=_scheme("int4", 16),
                   unit_scales=((96, b"\x11" * 8 + b"\xaa" * 4 + ONE),),
                   unit_codes=((0, b"\xff" * 32 + b"\x55" * 64),)),
    "Q4_K": Blocks(scheme=_scheme("int4", 32, minimum=True), shift=8,
                   unit_scales=((0, ONE + ZERO + _K_SCALES),),
                   unit_codes=((2, ZERO), (16, b"\x11" * 128)),
                   zero_codes=((16, b"\x00" * 128),)),
    "Q5_K": Blocks(scheme=_scheme("int8", 32, minimum=True),
                   unit_scales=((0, ONE + ZERO + _K_SCALES),),
                   unit_codes=((2, ZERO), (16, b"\x00" * 32 + b"\x11" * 128)),
                   zero_codes=((16, b"\x00" * 160),)),
    "Q6_K": Blocks(scheme=_scheme("int8", 16), unit_scales=((192, b"\x01" * 16 + ONE),),
                   unit_codes=((0, b"\x11" * 128 + b"\xaa" * 64),)),
    "IQ4_NL": Blocks(scheme=_scheme("int8", 32), scales="float16", unit_scales=((0, ONE),),
                     unit_codes=((2, b"\x88" * 16),)),
    "IQ4_XS": Blocks(scheme=_scheme("int8", 32),
                     unit_scales=((0, ONE + b"\xaa" * 2 + b"\x11" * 4),),
                     unit_codes=((8, b"\x88" * 128),)),
    "TQ1_0": Blocks(scheme=_scheme("int4", 256), scales="float16", unit_scales=((52, ONE),),
                    unit_codes=((0, b"\xff" * 52),)),
    "TQ2_0": Blocks(scheme=_scheme("int4", 256), scales="float16", unit_scales=((64, ONE),),
                    unit_codes=((0, b"\xaa" * 64),)),
    "MXFP4": Blocks(scheme=_scheme("int8", 32), unit_scales=((0, b"\x80"),),
                    unit_codes=((1, b"\x11" * 16),)),
    "NVFP4": Blocks(scheme=_scheme("int8", 16), unit_scales=((0, b"\x40" * 4),),
                    unit_codes=((4, b"\x11" * 32),)),
}  # fmt: skip
"""By block type. The others (IQ1, IQ2, IQ3) look their values up in grids; they are dequantized."""


def block_source(stored: StoredTensor) -> WeightSource:
    """Return the source of a tensor of any block type, with codes if a scheme holds them."""
    found = BLOCKS.get(stored.where.dtype) if len(stored.shape) == 2 else None
    return WeightSource(
        name=stored.name,
        shape=stored.shape,
        dtype=stored.where.dtype,
        ranges=(stored.where,),
        read_rows=lambda start, stop: dequantize(stored, start, stop),
        by_rows=True,
        scales="float32" if found is None else found.scales,
        scheme=None if found is None else found.scheme,
        read_codes=None if found is None else lambda a, b: _read(stored, found, a, b),
        not_held="its values are looked up in a grid" if found is None else "",
    )


def _read(stored: StoredTensor, kind: Blocks, start: int, stop: int) -> Quantized:
    """Read codes [n, K], scales and minimums [n, J], a few rows at a time."""
    columns, width = stored.shape[1], kind.scheme.block or stored.shape[1]
    codes = torch.empty(stop - start, columns, dtype=torch.int8)
    scale = torch.empty(stop - start, columns // width)
    minimum = torch.empty_like(scale) if kind.zero_codes else None
    step = max(1, DECODED_AT_ONCE // columns)
    for first in range(start, stop, step):
        last = min(first + step, stop)
        at = slice(first - start, last - start)
        codes[at] = _with(stored, first, last, kind.unit_scales) - kind.shift
        scale[at] = _with(stored, first, last, kind.unit_codes)[:, ::width]
        if minimum is not None:
            minimum[at] = _with(stored, first, last, kind.zero_codes)[:, ::width]
    if minimum is not None:
        minimum += kind.shift * scale
    return Quantized(scheme=kind.scheme, codes=codes, scale=scale, minimum=minimum)


def _with(stored: StoredTensor, start: int, stop: int, fields: Fields) -> Tensor:
    """Dequantize rows with these fields of every block overwritten: float32 [n, K]."""
    rows = map_bytes(stored.where).view(stored.shape[0], -1)[start:stop]
    size = block_size(stored.where.dtype)
    blocks = rows.reshape(-1, size).clone()
    for at, value in fields:
        blocks[:, at : at + len(value)] = torch.frombuffer(bytearray(value), dtype=torch.uint8)
    return dequantize_rows(blocks.view(rows.shape), stored.where.dtype)
