"""The schemes that rounding and packing are tested with. Asserts nothing."""

import torch

from graphs.quant_scheme import Scheme

SCHEMES = (
    Scheme(codes="int8"),
    Scheme(codes="int8", block=32),
    Scheme(codes="int4", block=32),
    Scheme(codes="int4", block=64, offset="zero_point"),
    Scheme(codes="int4", block=32, offset="minimum"),
    Scheme(codes="float8e4m3"),
)


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
