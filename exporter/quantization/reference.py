"""The reference for quantized bundles: a fake-quantized model in plain PyTorch.

Weights and rounded inputs are dequantized; the arithmetic in between is float32.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporter.checkpoint.quantized.value import Quantized, blocked
from exporter.decoder.load import StoredEmbedding, StoredLinear, load_decoder
from exporter.decoder.model import CPU, Decoder, RMSNorm
from exporter.quantization.recipe import Recipe
from exporter.quantization.rounding import round_activation
from graphs.quant_scheme import Scheme

BLOCK = 1 << 22  # numbers multiplied at once: 16 MiB in float32, which the heap keeps
PART = 1 << 20
"""Numbers rounded at once. Their dozen temporary copies of 4 MiB stay in the heap and mostly in the
processor's cache; with 64 MiB each is mapped anew, which took five times as long (2 cores)."""


class QuantizedLinear(nn.Module):
    """Fake-quantized linear: dequantizes its weight on every forward pass."""

    def __init__(
        self, name: str, read: Callable[[], Tensor], recipe: Recipe, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        self.name, self.read, self.recipe, self.bias = name, read, recipe, bias

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x [..., K] and add the bias [N], if there is one."""
        product = self.product(x)
        return product if self.bias is None else product + self.bias

    def product(self, x: Tensor) -> Tensor:
        """Multiply x [..., K]."""
        scheme = self.recipe.schemes[self.name]
        if scheme.activation is not None:
            x = round_activation(x, scheme, self.recipe.input_scale(self.name))
        if self.recipe.layout(self.name) != "nbits" or not self.recipe.rounds_blocks:
            return torch.cat([F.linear(x, dequantized(rows)) for rows in self.blocks()], dim=-1)
        rounded = round_blocks(x, scheme)
        return torch.cat([_nbits(x, rounded, rows) for rows in self.blocks()], dim=-1)

    def blocks(self) -> Iterator[list[Quantized]]:
        """Yield the weight [N, K], up to `BLOCK` numbers at a time, each block in parts of rows."""
        columns = self.recipe.spec.weight_shapes()[self.name][1]
        few, many = (max(1, size // columns) for size in (PART, BLOCK))
        exact = self.recipe.repacked.get(self.name)
        if exact is not None:
            yield split_rows(exact(), few)
        elif self.recipe.calibrated(self.name):  # what calibration decided is for whole weights
            weight = self.recipe.smoothed(self.name, self.read())
            yield split_rows(self.recipe.quantized(self.name, weight), few)
        else:
            for block in self.read().split(many):
                yield [self.recipe.quantized(self.name, rows) for rows in block.split(few)]


def split_rows(weight: Quantized, count: int) -> list[Quantized]:
    """Cut a weight into parts of `count` rows."""
    parts = [
        [None] * len(weight.codes.split(count)) if tensor is None else tensor.split(count)
        for tensor in (weight.codes, weight.scale, weight.zero_point, weight.minimum)
    ]
    return [
        replace(weight, codes=codes, scale=scale, zero_point=zero_point, minimum=minimum)
        for codes, scale, zero_point, minimum in zip(*parts, strict=True)
    ]


def dequantized(parts: list[Quantized]) -> Tensor:
    """Return the rows [N, K] that the parts stand for, one part after another, in float32."""
    return torch.cat([part.dequantized() for part in parts])


def round_blocks(x: Tensor, scheme: Scheme) -> Tensor:
    """Round each block of the last axis of x [..., K] to int8 and back, as `MatMulNBits` does.

    The scale is the block's largest absolute value / 127: `accuracy_level` 4 of ONNX Runtime.
    """
    blocks = blocked(x.reshape(-1, x.shape[-1]), scheme)  # [rows, J, block]
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = (blocks / scale.clamp_min(torch.finfo(x.dtype).tiny)).round()
    return (codes * scale).flatten(1)[:, : x.shape[-1]].view(x.shape)


def _nbits(x: Tensor, rounded: Tensor, weight: list[Quantized]) -> Tensor:
    """Multiply the rounded input by the codes, and the unrounded input by the minimums."""
    result = F.linear(rounded, dequantized([replace(part, minimum=None) for part in weight]))
    minimums = [part.minimum for part in weight if part.minimum is not None]
    if not minimums:
        return result
    sums = blocked(x.reshape(-1, x.shape[-1]), weight[0].scheme).sum(-1)  # [rows, J]
    return result + F.linear(sums, torch.cat(minimums)).view(result.shape)


class QuantizedEmbedding(QuantizedLinear):
    """A tied embedding that looks rows up in the codes of the output layer."""

    def forward(self, x: Tensor) -> Tensor:
        """Look up x [B, S]; returns float32 [B, S, E]."""
        exact = self.recipe.repacked.get(self.name)
        if exact is not None:
            return F.embedding(x, exact().dequantized())
        rows = self.recipe.quantized(self.name, F.embedding(x.flatten(), self.read()))
        return rows.dequantized().view(*x.shape, -1)


class Kept(QuantizedLinear):
    """Fake-quantized linear that keeps its dequantized weight: fast, 4 bytes per weight."""

    def __init__(
        self, name: str, read: Callable[[], Tensor], recipe: Recipe, bias: Tensor | None = None
    ) -> None:
        super().__init__(name, read, recipe, bias)
        self.weight = torch.cat([dequantized(rows) for rows in self.blocks()])

    def product(self, x: Tensor) -> Tensor:
        """Multiply x [..., K], rounding it if the scheme rounds inputs."""
        scheme = self.recipe.schemes[self.name]
        if scheme.activation is not None:
            x = round_activation(x, scheme, self.recipe.input_scale(self.name))
        return F.linear(x, self.weight)


def simulate(
    recipe: Recipe,
    weight: Callable[[str], Tensor],
    *,
    keep: bool = False,
    device: torch.device = CPU,
) -> Decoder:
    """Build the fake-quantized decoder of `recipe` from the checkpoint's `weight(name)`.

    `keep` holds all dequantized weights in memory; without it, a 7B takes a few hundred megabytes.
    On a `device` other than the CPU, weights are moved there one by one, as they are needed.
    """
    spec = recipe.spec
    if device != CPU:
        recipe = recipe.on(device)
        weight = partial(_moved, weight, device)
    decoder = load_decoder(spec, weight, device=device)
    head = "model.embed_tokens" if spec.tie_word_embeddings else "lm_head"
    for path, module in list(decoder.named_modules()):
        name = f"{head if path == 'lm_head' else path}.weight"
        if name in recipe.schemes and isinstance(module, StoredEmbedding):
            decoder.set_submodule(path, QuantizedEmbedding(name, module.read, recipe))
        elif name in recipe.schemes and isinstance(module, StoredLinear):
            kind = Kept if keep else QuantizedLinear
            bias = _smoothed_bias(recipe, path, module)
            decoder.set_submodule(path, kind(name, module.read, recipe, bias))
        elif isinstance(module, RMSNorm):
            gain = recipe.smoothed(name, module.weight.detach())
            module.weight = nn.Parameter(gain, requires_grad=False)
        elif isinstance(module, StoredLinear) and recipe.calibrated(name):
            module.read = partial(_smoothed, recipe, name, module.read)
            module.bias = _smoothed_bias(recipe, path, module)
    return decoder


def _smoothed_bias(recipe: Recipe, path: str, linear: StoredLinear) -> Tensor | None:
    return None if linear.bias is None else recipe.smoothed(f"{path}.bias", linear.bias)


def _moved(weight: Callable[[str], Tensor], device: torch.device, name: str) -> Tensor:
    return weight(name).to(device)


def _smoothed(recipe: Recipe, name: str, read: Callable[[], Tensor]) -> Tensor:
    return recipe.smoothed(name, read())
