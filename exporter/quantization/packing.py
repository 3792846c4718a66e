"""Pack quantized weights in the layouts of `graphs.quant_scheme.stored_parts`, and unpack them.

Rows are independent of each other in every part, so a weight may be packed a few rows at a time.
The parts of some rows follow each other in the file, but lie side by side (in the last dimension)
in the layout `transposed`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from exporter.checkpoint.quantized.value import Quantized
from graphs.quant_scheme import Scheme
from graphs.targets import CodeLayout

LOWEST = {4: 8, 8: 128}  # added to signed codes to make them start at 0, by bits


def pack_int4(codes: Tensor) -> Tensor:
    """Pack codes [N, K] of 4 bits two to a byte, the first in the low half: uint8 [N, K/2].

    An odd last column is padded with a zero.
    """
    halves = F.pad(codes.view(torch.uint8) & 0xF, (0, codes.shape[1] % 2))
    halves = halves.view(codes.shape[0], -1, 2)
    return halves[..., 0] | (halves[..., 1] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """Undo `pack_int4`: int8 [N, 2 * bytes], -8 to 7."""
    low, high = packed & 0xF, packed >> 4
    codes = torch.stack([low, high], -1).flatten(-2).to(torch.int8)
    return torch.where(codes > 7, codes - 16, codes)


def pack(quantized: Quantized, stored: torch.dtype, layout: CodeLayout) -> list[Tensor]:
    """The tensors of a weight [N, K] in the order of `stored_parts`; scales become `stored`."""
    scheme, codes = quantized.scheme, quantized.codes
    match layout:
        case "nbits":
            parts = [_nbits(codes, scheme)]
        case "transposed":
            parts = [pack_int4(codes.T) if scheme.bits == 4 else codes.T]
        case "onnx":
            parts = [pack_int4(codes) if scheme.bits == 4 else codes]
    scale = quantized.scale if scheme.block is not None else quantized.scale[:, 0]
    parts.append((scale.mT if layout == "transposed" and scale.dim() == 2 else scale).to(stored))
    if quantized.zero_point is not None:
        points = (quantized.zero_point.to(torch.int16) + LOWEST[scheme.bits]).to(torch.uint8)
        parts.append(pack_int4(points) if scheme.bits == 4 else points)
    if quantized.minimum is not None:
        # MatMulNBits reads unsigned codes as signed ones, so the minimum stays the same
        parts.append(quantized.minimum.to(stored))
    return [part.contiguous() for part in parts]


def unpack(
    parts: list[Tensor], shape: tuple[int, int], scheme: Scheme, layout: CodeLayout
) -> Quantized:
    """Undo `pack` for a weight of this shape."""
    rows, columns = shape
    codes, scale, *rest = parts
    if layout == "transposed":
        codes, scale = (unpack_int4(codes) if scheme.bits == 4 else codes).T, scale.t()
    elif layout == "nbits":
        codes = codes.view(rows, -1)
        codes = unpack_unsigned(codes) if scheme.bits == 4 else codes
        codes = (codes[:, :columns].to(torch.int16) - LOWEST[scheme.bits]).to(torch.int8)
    elif scheme.bits == 4:
        codes = unpack_int4(codes)[:, :columns]
    blocks = scheme.blocks(columns)
    zero_point = minimum = None
    if scheme.offset == "zero_point":
        points = unpack_unsigned(rest[0]) if scheme.bits == 4 else rest[0]
        zero_point = (points[:, :blocks].to(torch.int16) - LOWEST[scheme.bits]).to(torch.int8)
    if scheme.offset == "minimum":
        minimum = rest[0].float()
    return Quantized(
        scheme=scheme, codes=codes, scale=scale.float().reshape(rows, blocks),
        zero_point=zero_point, minimum=minimum,
    )  # fmt: skip


def unpack_unsigned(packed: Tensor) -> Tensor:
    """Undo `pack_int4` for codes of 0 to 15: uint8 [N, 2 * bytes]."""
    return torch.stack([packed & 0xF, packed >> 4], -1).flatten(-2)


def _nbits(codes: Tensor, scheme: Scheme) -> Tensor:
    """Unsigned codes in whole blocks: uint8 [N, J, bytes of a block]."""
    rows, columns = codes.shape
    blocks = scheme.blocks(columns)
    unsigned = (codes.to(torch.int16) + LOWEST[scheme.bits]).to(torch.uint8)
    unsigned = F.pad(unsigned, (0, blocks * (scheme.block or columns) - columns))
    packed = pack_int4(unsigned) if scheme.bits == 4 else unsigned
    return packed.view(rows, blocks, -1)
