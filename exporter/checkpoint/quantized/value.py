"""A quantized weight as codes and scales, whatever made it: a checkpoint or our own rounding."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from graphs.quant_scheme import Scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """A weight [N, K] as its scheme stores it; J is the number of blocks in a row.

    `weight = scale * (codes - zero_point) + minimum`, each of the three [N, J].
    """

    scheme: Scheme
    codes: Tensor  # [N, K]; int8 (also for int4, -8 to 7), or float8_e4m3fn
    scale: Tensor  # [N, J], float32, rounded to what the bundle stores
    zero_point: Tensor | None = None  # [N, J], int8
    minimum: Tensor | None = None  # [N, J], float32

    def to(self, device: torch.device) -> "Quantized":
        """Return the same weight with its tensors on `device`."""
        return replace(
            self,
            codes=self.codes.to(device),
            scale=self.scale.to(device),
            zero_point=None if self.zero_point is None else self.zero_point.to(device),
            minimum=None if self.minimum is None else self.minimum.to(device),
        )

    def held_in(self, scheme: Scheme, stored: torch.dtype) -> "Quantized":
        """Return the same codes in a scheme that holds them, scales rounded to the type `stored`.

        A block of the scheme divides the own one, its codes are as wide or wider, and its offset
        can express the own one. So no value changes, apart from the rounding of scales.
        """
        blocks = scheme.blocks(self.codes.shape[1])
        repeat = 1
        if self.scheme.block is not None and scheme.block is not None:
            repeat = self.scheme.block // scheme.block

        def spread(values: Tensor) -> Tensor:
            if self.scheme.block is None:
                return values.expand(-1, blocks)
            return values.repeat_interleave(repeat, 1)[:, :blocks]

        zero_point, minimum = self.zero_point, self.minimum
        if scheme.offset == "zero_point" and zero_point is None:
            zero_point = torch.zeros(self.scale.shape, dtype=torch.int8)
        if scheme.offset == "minimum" and minimum is None:
            points = torch.zeros(()) if zero_point is None else zero_point.float()
            zero_point, minimum = None, -points * self.scale
        return replace(
            self,
            scheme=scheme,
            scale=spread(self.scale).to(stored).float(),
            zero_point=None if zero_point is None else spread(zero_point),
            minimum=None if minimum is None else spread(minimum).to(stored).float(),
        )

    def rows(self, index: Tensor) -> "Quantized":
        """Return the rows of an index [n], in its order."""
        return replace(
            self,
            codes=self.codes.view(torch.uint8)[index].view(self.codes.dtype),
            scale=self.scale[index],
            zero_point=None if self.zero_point is None else self.zero_point[index],
            minimum=None if self.minimum is None else self.minimum[index],
        )

    def dequantized(self) -> Tensor:
        """Return the dequantized weight [N, K], in float32."""
        n, k = self.codes.shape
        codes = blocked(self.codes.float(), self.scheme)  # [N, J, block]
        if self.zero_point is not None:
            codes = codes - self.zero_point.float().unsqueeze(-1)
        weight = codes * self.scale.unsqueeze(-1)
        if self.minimum is not None:
            weight = weight + self.minimum.unsqueeze(-1)
        return weight.view(n, -1)[:, :k]


def blocked(weight: Tensor, scheme: Scheme) -> Tensor:
    """Cut the rows of a weight [N, K] into blocks [N, J, block], the last padded with zeros."""
    n, k = weight.shape
    blocks = scheme.blocks(k)
    return F.pad(weight, (0, blocks * (scheme.block or k) - k)).view(n, blocks, -1)
