"""Decoder layers in float32, and samples that pass through one group by group. Knows no method.

Layers are quantized from input to output: the input of a group is observed after the groups before
it are quantized. So all samples stop before each group, in files, and continue with its new
weights. The arithmetic is that of the decoder's stages (`exporter/decoder/model.py`).
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from exporter.decoder.model import Decoder, Layer, Step, empty_caches
from exporter.quantization.recipe import Recipe
from exporter.quantization.reference import Kept
from graphs.spec import ModelSpec

PIECE = 2048  # tokens that run through a layer at once, or one sample if that is longer
QKV, OUTPUT, GATE_UP, DOWN = range(4)  # groups of a layer, as `layer_groups` orders them
FROM_FILE = (OUTPUT, DOWN)  # groups whose input is kept in a file: no norm of the residual gives it


def float_layer(
    spec: ModelSpec, index: int, weight: Callable[[str], Tensor], device: torch.device
) -> Layer:
    """Build decoder layer `index` in float32 on `device` from `weight(canonical name)`."""
    with torch.device("meta"):
        layer = Layer(spec, index)
    for path, _ in list(layer.named_parameters()):
        module, _, leaf = path.rpartition(".")
        value = weight(f"model.layers.{index}.{path}").to(device, torch.float32)
        setattr(layer.get_submodule(module), leaf, nn.Parameter(value, requires_grad=False))
    return layer.eval()


def quantized_layer(
    recipe: Recipe, index: int, weight: Callable[[str], Tensor], device: torch.device
) -> Layer:
    """Build decoder layer `index` with the weights of `recipe`, smoothing folded in."""
    layer = float_layer(recipe.spec, index, weight, device)
    install_weights(layer, recipe, [f"model.layers.{index}.{path}" for path, _ in
                                    list(layer.named_parameters())], weight)  # fmt: skip
    return layer


def install_weights(
    layer: Layer, recipe: Recipe, names: Iterable[str], weight: Callable[[str], Tensor]
) -> None:
    """Replace the norms, linears and biases `names` of the layer by what the recipe stores."""
    device = layer.input_layernorm.weight.device
    for name in names:
        path, _, leaf = name.split(".", 3)[3].rpartition(".")  # the leaf is `weight` or `bias`
        module = layer.get_submodule(path)
        if name in recipe.schemes:
            bias = module.bias if isinstance(module.bias, Tensor) else None
            linear = Kept(name, partial(weight, name), recipe, bias)
            linear.weight = linear.weight.to(device)
            layer.set_submodule(path, linear)
        elif recipe.calibrated(name):
            value = recipe.smoothed(name, weight(name).float()).to(device)
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))


def run_layer(decoder: Decoder, layer: Layer, x: Tensor) -> Tensor:
    """Run whole texts x [B, S, E] through a layer, from position 0 on; returns [B, S, E]."""
    step, past = _whole_text(decoder, x)
    out: Tensor = layer(x, step, past)[0]  # [B, S, E]
    return out


def tensor_in_file(path: Path, *shape: int) -> Tensor:
    """Map a float32 tensor onto a file, so that the kernel can write it out under memory pressure.

    Creates or extends the file. Raises OSError if the disk is full: the space is allocated now,
    because with a sparse file the kernel would report it by SIGBUS when a page is touched.
    """
    size = torch.Size(shape).numel()
    with path.open("ab") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, size * torch.float32.itemsize))
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.float32).view(shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPass:
    """One stream of samples [n, S] on its way through one layer.

    `residual` [n, S, E] is updated in place. `pending` is a file for the inputs of `o_proj` and
    `down_proj`, which are observed first and projected after their linear is quantized.
    """

    decoder: Decoder  # without weights: it computes masks and angles
    residual: Tensor
    pending: Path
    device: torch.device

    def pieces(self) -> Iterator[slice]:
        """Return slices of the samples, each of about `PIECE` tokens."""
        count, length = self.residual.shape[:2]
        step = max(1, PIECE // length)
        return (slice(start, min(start + step, count)) for start in range(0, count, step))

    def group_input(self, layer: Layer, group: int, piece: slice) -> Tensor:
        """Run some samples up to a group of the layer; returns the group's input [b, S, K].

        Groups have to be visited in order, all samples through one before the next.
        """
        x = self.residual[piece].to(self.device)  # [b, S, E]
        if group == QKV:
            return layer.attention_input(x)
        if group == OUTPUT:
            step, past = _whole_text(self.decoder, x)
            heads, _ = layer.self_attn(layer.attention_input(x), step, past)  # [b, S, H * D]
            return self._store(piece, heads)
        if group == GATE_UP:
            x = layer.add_attention(
                x, self._load(piece, layer.self_attn.o_proj.weight)
            )  # [b, S, E]
            self.residual[piece] = x.cpu()
            return layer.mlp_input(x)
        return self._store(piece, layer.mlp(layer.mlp_input(x)))  # [b, S, F]

    def finish(self, layer: Layer, piece: slice) -> None:
        """Run some samples from the input of `down_proj` to the end of the layer."""
        x = self.residual[piece].to(self.device)  # [b, S, E]
        x = layer.add_mlp(x, self._load(piece, layer.mlp.down_proj.weight))  # [b, S, E]
        self.residual[piece] = x.cpu()

    def divide_pending(self, smoothing: Tensor) -> None:
        """Divide the stored input of `o_proj` or `down_proj` by [K], now that its producer does."""
        width, inverse = len(smoothing), smoothing.reciprocal().cpu()
        stored = tensor_in_file(self.pending, *self.residual.shape[:2], width)  # [n, S, K]
        for piece in self.pieces():
            stored[piece] *= inverse

    def _store(self, piece: slice, values: Tensor) -> Tensor:
        count, length = self.residual.shape[:2]
        tensor_in_file(self.pending, count, length, values.shape[-1])[piece] = values.cpu()
        return values

    def _load(self, piece: slice, weight: Tensor) -> Tensor:
        """Read back the input [b, S, K] of the linear whose weight is [N, K]."""
        stored = tensor_in_file(self.pending, *self.residual.shape[:2], weight.shape[1])
        return stored[piece].to(self.device)  # [b, S, K]


def _whole_text(decoder: Decoder, x: Tensor) -> tuple[Step, list[Tensor]]:
    """Prepare one step over all of x [B, S, E], into two empty caches that never wrap."""
    batch, length = x.shape[:2]
    past = empty_caches(decoder.spec, batch, length, x.device)
    positions = torch.arange(length, device=x.device).expand(batch, -1)  # [B, S]
    return decoder.prepare(positions, past, x.dtype), past[:2]
