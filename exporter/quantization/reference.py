"""The reference for quantized bundles: a fake-quantized model in plain PyTorch.

Weights and rounded inputs are dequantized; the arithmetic in between is float32.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporter.decoder.model import Decoder, RMSNorm, StoredEmbedding, load_decoder
from exporter.quantization.recipe import Recipe
from exporter.quantization.rounding import Quantized, blocked, round_activation
from graphs.quant_scheme import Scheme

BLOCK = 1 << 24  # numbers dequantized at once: 64 MiB in float32


class QuantizedLinear(nn.Module):
    """Fake-quantized linear: dequantizes its weight on every forward pass."""

    def __init__(self, name: str, weight: Tensor, recipe: Recipe) -> None:
        super().__init__()
        self.name, self.weight, self.recipe = name, weight, recipe

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x [..., K]."""
        scheme = self.recipe.schemes[self.name]
        if scheme.activation is not None:
            x = round_activation(x, scheme, self.recipe.input_scale(self.name))
        if self.recipe.layout(self.name) != "nbits":
            return torch.cat([F.linear(x, rows.dequantized()) for rows in self.blocks()], dim=-1)
        rounded = round_blocks(x, scheme)
        return torch.cat([_nbits(x, rounded, rows) for rows in self.blocks()], dim=-1)

    def blocks(self) -> Iterator[Quantized]:
        """Yield the quantized weight [N, K], some rows at a time."""
        exact = self.recipe.repacked.get(self.name)
        if exact is not None:
            yield exact()
            return
        rows = max(1, BLOCK // self.weight.shape[1])
        whole = self.recipe.calibrated(self.name)
        for block in [self.weight] if whole else self.weight.split(rows):
            yield self.recipe.quantized(self.name, self.recipe.smoothed(self.name, block))


def round_blocks(x: Tensor, scheme: Scheme) -> Tensor:
    """Round each block of the last axis of x [..., K] to int8 and back, as `MatMulNBits` does.

    The scale is the block's largest absolute value / 127: `accuracy_level` 4 of ONNX Runtime.
    """
    blocks = blocked(x.reshape(-1, x.shape[-1]), scheme)  # [rows, J, block]
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = (blocks / scale.clamp_min(torch.finfo(x.dtype).tiny)).round()
    return (codes * scale).flatten(1)[:, : x.shape[-1]].view(x.shape)


def _nbits(x: Tensor, rounded: Tensor, weight: Quantized) -> Tensor:
    """Multiply the rounded input by the codes, and the unrounded input by the minimums."""
    result = F.linear(rounded, replace(weight, minimum=None).dequantized())
    if weight.minimum is None:
        return result
    sums = blocked(x.reshape(-1, x.shape[-1]), weight.scheme).sum(-1)  # [rows, J]
    return result + F.linear(sums, weight.minimum).view(result.shape)


class QuantizedEmbedding(QuantizedLinear):
    """A tied embedding that looks rows up in the codes of the output layer."""

    def forward(self, x: Tensor) -> Tensor:
        """Look up x [B, S]; returns float32 [B, S, E]."""
        exact = self.recipe.repacked.get(self.name)
        if exact is not None:
            return F.embedding(x, exact().dequantized())
        rows = self.recipe.quantized(self.name, F.embedding(x.flatten(), self.weight))
        return rows.dequantized().view(*x.shape, -1)


class Kept(QuantizedLinear):
    """Fake-quantized linear that keeps its dequantized weight: fast, 4 bytes per weight."""

    def __init__(self, name: str, weight: Tensor, recipe: Recipe) -> None:
        super().__init__(name, weight, recipe)
        self.kept = torch.cat([rows.dequantized() for rows in self.blocks()])

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x [..., K], rounding it if the scheme rounds inputs."""
        scheme = self.recipe.schemes[self.name]
        if scheme.activation is not None:
            x = round_activation(x, scheme, self.recipe.input_scale(self.name))
        return F.linear(x, self.kept)


def simulate(recipe: Recipe, weight: Callable[[str], Tensor], *, keep: bool = False) -> Decoder:
    """Build the fake-quantized decoder of `recipe` from the checkpoint's `weight(name)`.

    `keep` holds all dequantized weights in memory; without it, a 7B takes a few hundred megabytes.
    """
    spec = recipe.spec
    decoder = load_decoder(spec, weight)
    head = "model.embed_tokens" if spec.tie_word_embeddings else "lm_head"
    for path, module in list(decoder.named_modules()):
        name = f"{head if path == 'lm_head' else path}.weight"
        if name in recipe.schemes and isinstance(module, StoredEmbedding):
            decoder.set_submodule(path, QuantizedEmbedding(name, weight(name), recipe))
        elif name in recipe.schemes:
            linear = (Kept if keep else QuantizedLinear)(name, weight(name), recipe)
            decoder.set_submodule(path, linear)
        elif isinstance(module, RMSNorm):
            gain = recipe.smoothed(name, module.weight.detach())
            module.weight = nn.Parameter(gain, requires_grad=False)
        elif recipe.calibrated(name):
            module.weight = recipe.smoothed(name, weight(name))
    return decoder
