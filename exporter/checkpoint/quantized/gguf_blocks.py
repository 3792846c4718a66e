"""Read the blocks of a GGUF file as codes and scales, so nothing is rounded a second time.

Places and meanings are those of the structs in ggml's `ggml-common.h` and of the functions
`dequantize_row_*` in `ggml-quants.c`. A block holds codes, one float16 scale `d` and, if it has
sub-blocks, small integers that multiply it; types with minimums have the same once more:

    weight = d sub_scale code + minimum        Q4_1, Q5_1: minimum m
                                               Q2_K, Q4_K, Q5_K: minimum -dmin sub_minimum

Codes of more than four bits lie in two places, their low and their high bits.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from exporter.checkpoint.gguf_file import block_size, dequantize
from exporter.checkpoint.quantized.value import Quantized
from exporter.checkpoint.stored import StoredTensor, map_bytes
from exporter.checkpoint.weight_source import DECODED_AT_ONCE, WeightSource
from graphs.dtypes import Codes
from graphs.quant_scheme import Scheme


@dataclass(frozen=True, slots=True)
class Bits:
    """Numbers of a few `bits` in the bytes `start` to `stop` of a block.

    The bytes are cut into runs of `run`; in each run, the lowest bits of all bytes come first.
    """

    start: int
    stop: int
    run: int
    bits: int

    def read(self, blocks: Tensor) -> Tensor:
        """Return the numbers of blocks [..., bytes] in order: uint8 [..., count]."""
        data = blocks[..., self.start : self.stop].unflatten(-1, (-1, self.run))
        parts = [data >> shift & (1 << self.bits) - 1 for shift in range(0, 8, self.bits)]
        return torch.stack(parts, -2).flatten(-3)


Scales = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """How the codes of a block type are held, and how they and their scales are read.

    A code is `low`, with `high` in the bits above it, less `minus`; or what `table` has there.
    `read_scales` returns scales and maybe minimums of blocks [..., bytes], [..., J] in float32.
    `scale_type` is the type that holds all scales.
    """

    codes: Codes
    block: int
    low: Bits
    high: Bits | None = None
    minus: int = 0
    table: tuple[int, ...] = ()
    read_scales: Scales
    minimum: bool = False
    scale_type: str = "float32"

    @property
    def scheme(self) -> Scheme:
        """The scheme that holds the codes."""
        offset = "minimum" if self.minimum else "none"
        return Scheme(codes=self.codes, block=self.block, offset=offset)  # type: ignore[arg-type]

    def read_codes(self, blocks: Tensor) -> Tensor:
        """Return the codes of blocks [..., bytes]: int8 [..., weights of a block]."""
        codes = self.low.read(blocks)
        if self.high is not None:
            codes |= self.high.read(blocks) << self.low.bits
        if self.table:
            return torch.tensor(self.table, dtype=torch.int8)[codes.int()]
        return codes.view(torch.int8) - self.minus


def _half(blocks: Tensor, at: int) -> Tensor:
    """Read a float16 number of each block: float32 [..., 1]."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).float()


def _one(at: int, minimum: int | None = None, minus: int = 0) -> Scales:
    """Read one scale, and maybe a minimum, which grows where codes are stored `minus` lower."""

    def read(blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        scale = _half(blocks, at)
        return scale, None if minimum is None else _half(blocks, minimum) + minus * scale

    return read


def _scaled(at: int, low: Bits, high: Bits | None = None, minus: int = 0) -> Scales:
    """Read a scale times an integer for each sub-block."""

    def read(blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        factors = low.read(blocks)
        if high is not None:
            factors = factors | high.read(blocks) << low.bits
        return _half(blocks, at) * (factors.float() - minus), None

    return read


def _signed(at: int, start: int, stop: int) -> Scales:
    """Read a scale times a signed byte for each sub-block."""
    return lambda blocks: (
        _half(blocks, at) * blocks[..., start:stop].contiguous().view(torch.int8).float(), None
    )  # fmt: skip


def _q2_k(blocks: Tensor) -> tuple[Tensor, Tensor | None]:
    factors = blocks[..., :16]  # scales in the low halves, minimums in the high ones
    minimum = -_half(blocks, 82) * (factors >> 4).float()
    return _half(blocks, 80) * (factors & 0xF).float(), minimum


def _six_bits(minus: int) -> Scales:
    """Read the eight scales and minimums of 6 bits of Q4_K and Q5_K."""

    def read(blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        scales, minimums, both = blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
        low = torch.cat([scales & 63, both & 15 | scales >> 6 << 4], -1)
        high = torch.cat([minimums & 63, both >> 4 | minimums >> 6 << 4], -1)
        scale = _half(blocks, 0) * low.float()
        return scale, minus * scale - _half(blocks, 2) * high.float()

    return read


def _power_of_two(blocks: Tensor) -> tuple[Tensor, Tensor | None]:
    """Read MXFP4's exponent; the table has twice the values, so the power is half."""
    return torch.exp2(blocks[..., :1].float() - 128), None


def _e4m3(blocks: Tensor) -> tuple[Tensor, Tensor | None]:
    """Read NVFP4's four scales, without sign; the table has twice the values."""
    scales = blocks[..., :4].contiguous().view(torch.float8_e4m3fn).float() / 2
    return scales.nan_to_num(0.0), None  # ggml reads 127 as 0


_HALVES = Bits(2, 18, 16, 4)
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)

BLOCKS: Mapping[str, Blocks] = {
    "Q4_0": Blocks(codes="int4", block=32, low=_HALVES, minus=8, read_scales=_one(0),
                   scale_type="float16"),
    "Q4_1": Blocks(codes="int4", block=32, low=Bits(4, 20, 16, 4), minus=8, minimum=True,
                   read_scales=_one(0, minimum=2, minus=8)),
    "Q5_0": Blocks(codes="int8", block=32, low=Bits(6, 22, 16, 4), high=Bits(2, 6, 1, 1),
                   minus=16, read_scales=_one(0), scale_type="float16"),
    "Q5_1": Blocks(codes="int8", block=32, low=Bits(8, 24, 16, 4), high=Bits(4, 8, 1, 1),
                   minimum=True, read_scales=_one(0, minimum=2)),
    "Q8_0": Blocks(codes="int8", block=32, low=Bits(2, 34, 32, 8), read_scales=_one(0),
                   scale_type="float16"),
    "Q2_K": Blocks(codes="int4", block=16, low=Bits(16, 80, 32, 2), minimum=True,
                   read_scales=_q2_k),
    "Q3_K": Blocks(codes="int4", block=16, low=Bits(32, 96, 32, 2), high=Bits(0, 32, 32, 1),
                   minus=4,
                   read_scales=_scaled(108, Bits(96, 104, 8, 4), Bits(104, 108, 4, 2), minus=32)),
    "Q4_K": Blocks(codes="int4", block=32, low=Bits(16, 144, 32, 4), minus=8, minimum=True,
                   read_scales=_six_bits(minus=8)),
    "Q5_K": Blocks(codes="int8", block=32, low=Bits(48, 176, 32, 4), high=Bits(16, 48, 32, 1),
                   minimum=True, read_scales=_six_bits(minus=0)),
    "Q6_K": Blocks(codes="int8", block=16, low=Bits(0, 128, 64, 4), high=Bits(128, 192, 32, 2),
                   minus=32, read_scales=_signed(208, 192, 208)),
    "IQ4_NL": Blocks(codes="int8", block=32, low=_HALVES, table=_IQ4, read_scales=_one(0),
                     scale_type="float16"),
    "IQ4_XS": Blocks(codes="int8", block=32, low=Bits(8, 136, 16, 4), table=_IQ4,
                     read_scales=_scaled(0, Bits(4, 8, 1, 4), Bits(2, 4, 1, 2), minus=32)),
    "TQ2_0": Blocks(codes="int4", block=256, low=Bits(0, 64, 32, 2), minus=1,
                    read_scales=_one(64), scale_type="float16"),
    "MXFP4": Blocks(codes="int8", block=32, low=Bits(1, 17, 16, 4), table=_E2M1,
                    read_scales=_power_of_two),
    "NVFP4": Blocks(codes="int8", block=16, low=Bits(4, 36, 8, 4), table=_E2M1,
                    read_scales=_e4m3),
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
        scales="float32" if found is None else found.scale_type,
        scheme=None if found is None else found.scheme,
        read_codes=None if found is None else lambda a, b: _read(stored, found, a, b),
        not_held="its values are looked up in a grid" if found is None else "",
    )


def _read(stored: StoredTensor, kind: Blocks, start: int, stop: int) -> Quantized:
    """Read codes [n, K], scales and minimums [n, J], a few rows at a time."""
    rows, columns = stored.shape
    size, count = block_size(stored.where.dtype), columns // kind.block
    blocks = map_bytes(stored.where).view(rows, -1, size)  # [N, blocks, bytes]
    codes = torch.empty(stop - start, columns, dtype=torch.int8)
    scale = torch.empty(stop - start, count)
    minimum = torch.empty_like(scale) if kind.minimum else None
    step = max(1, DECODED_AT_ONCE // columns)
    for first in range(start, stop, step):
        part = blocks[first : min(first + step, stop)]
        at = slice(first - start, first - start + len(part))
        codes[at] = kind.read_codes(part).flatten(1)
        found, lowest = kind.read_scales(part)
        scale[at] = found.flatten(1)
        if minimum is not None and lowest is not None:
            minimum[at] = lowest.flatten(1)
    return Quantized(scheme=kind.scheme, codes=codes, scale=scale, minimum=minimum)
