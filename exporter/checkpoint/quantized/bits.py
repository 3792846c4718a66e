"""Unpack codes of a few bits from words. Knows no method."""

import torch
from torch import Tensor


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the first `count` codes of `bits` bits in each row of words: uint8 [..., count].

    Codes follow each other without gaps from the lowest bit of the first word on, across its end if
    need be: GPTQ, compressed-tensors and MLX all pack so. `words` is int32 or uint8, little-endian.
    """
    data = words.contiguous().view(torch.uint8)  # [..., bytes]
    if bits == 8:
        return data[..., :count]
    spare = -data.shape[-1] % bits
    if spare:
        data = torch.nn.functional.pad(data, (0, spare))
    data = data.unflatten(-1, (-1, bits))  # eight codes lie in `bits` bytes
    codes = []
    for place in range(8):
        byte, shift = divmod(place * bits, 8)
        code = data[..., byte] >> shift
        if shift + bits > 8:
            code = code | (data[..., byte + 1] << (8 - shift))
        codes.append(code & ((1 << bits) - 1))
    return torch.stack(codes, -1).flatten(-2)[..., :count]
