"""One decoder layer and the samples that pass through it, group by group. Knows no method.

Quantization goes from input to output: what a group reads is observed once the groups before it
are quantized. So all samples wait before each group, in files, and go on with its new weights.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from exporter.decoder.model import Decoder, Layer, Step, inverse_frequencies
from exporter.quantization.recipe import Recipe
from exporter.quantization.reference import Kept
from graphs.spec import ModelSpec

PIECE = 2048  # tokens that run through a layer at once, or one sample if that is longer


def float_layer(
    spec: ModelSpec, index: int, weight: Callable[[str], Tensor], device: torch.device
) -> Layer:
    """Build decoder layer `index` in float32 on `device` from `weight(canonical name)`."""
    with torch.device("meta"):
        layer = Layer(spec, spec.layer_windows[index])
    for path, _ in list(layer.named_parameters()):
        module, _, leaf = path.rpartition(".")
        value = weight(f"model.layers.{index}.{path}").to(device, torch.float32)
        setattr(layer.get_submodule(module), leaf, nn.Parameter(value, requires_grad=False))
    return layer.eval()


def quantized_layer(
    recipe: Recipe, index: int, weight: Callable[[str], Tensor], device: torch.device
) -> Layer:
    """Build the layer likewise as `recipe` has it, smoothing folded in."""
    layer = float_layer(recipe.spec, index, weight, device)
    install(layer, recipe, [f"model.layers.{index}.{path}" for path, _ in
                            list(layer.named_parameters())], weight)  # fmt: skip
    return layer


def install(
    layer: Layer, recipe: Recipe, names: Iterable[str], weight: Callable[[str], Tensor]
) -> None:
    """Put the weights `names`, norms or linears, into the layer as the recipe has them."""
    device = layer.input_layernorm.weight.device
    for name in names:
        path = name.split(".", 3)[3].removesuffix(".weight")
        if name in recipe.schemes:
            linear = Kept(name, weight(name), recipe)
            linear.kept = linear.kept.to(device)
            layer.set_submodule(path, linear)
        elif recipe.calibrated(name):
            value = recipe.smoothed(name, weight(name).float()).to(device)
            module = layer.get_submodule(path)
            module.weight = nn.Parameter(value, requires_grad=False)


def mapped(path: Path, *shape: int) -> Tensor:
    """A float32 tensor whose memory is the file: the kernel writes it out when it needs room.

    Raises OSError where the disk has no room: of a file with holes the kernel would tell only when
    a page is touched, and by SIGBUS.
    """
    size = torch.Size(shape).numel()
    with path.open("ab") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, size * torch.float32.itemsize))
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.float32).view(shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """Samples [n, S] on their way through one layer. `residual` [n, S, E] is changed in place.

    `scratch` is a file for what waits before `o_proj` and `down_proj`.
    """

    decoder: Decoder  # without weights: it computes masks and angles
    residual: Tensor
    scratch: Path
    device: torch.device

    def pieces(self) -> Iterator[slice]:
        """The samples, a few at a time."""
        count, length = self.residual.shape[:2]
        step = max(1, PIECE // length)
        return (slice(start, min(start + step, count)) for start in range(0, count, step))

    def enter(self, layer: Layer, stage: int, piece: slice) -> Tensor:
        """Bring some samples to group number `stage` of four; returns its input [b, S, K].

        Stages have to be passed in order, all samples through one before the next.
        """
        x = self.residual[piece].to(self.device)
        if stage == 0:
            normal: Tensor = layer.input_layernorm(x)
            return normal
        if stage == 1:
            return self._keep(piece, self._heads(layer, x))
        if stage == 2:
            x = x + layer.self_attn.o_proj(self._kept(piece, layer.self_attn.o_proj.weight))
            self.residual[piece] = x.cpu()
        normal = layer.post_attention_layernorm(x)
        return normal if stage == 2 else self._keep(piece, layer.mlp.gated(normal))

    def leave(self, layer: Layer, piece: slice) -> None:
        """Bring some samples to the layer's end."""
        x = self.residual[piece].to(self.device)
        x = x + layer.mlp.down_proj(self._kept(piece, layer.mlp.down_proj.weight))
        self.residual[piece] = x.cpu()

    def divide(self, smoothing: Tensor) -> None:
        """Divide what waits before `o_proj` or `down_proj` by [K], as its producer does now."""
        width, inverse = len(smoothing), smoothing.reciprocal().cpu()
        waiting = mapped(self.scratch, *self.residual.shape[:2], width)
        for piece in self.pieces():
            waiting[piece] *= inverse

    def _heads(self, layer: Layer, x: Tensor) -> Tensor:
        step, past = _step(self.decoder, x)
        seen, _ = layer.self_attn.heads(layer.input_layernorm(x), step, past)
        return seen

    def _keep(self, piece: slice, values: Tensor) -> Tensor:
        count, length = self.residual.shape[:2]
        mapped(self.scratch, count, length, values.shape[-1])[piece] = values.cpu()
        return values

    def _kept(self, piece: slice, reader: Tensor) -> Tensor:
        count, length = self.residual.shape[:2]
        values = mapped(self.scratch, count, length, reader.shape[1])
        return values[piece].to(self.device)


def bare_decoder(spec: ModelSpec, device: torch.device) -> Decoder:
    """Build a decoder that can prepare steps, and has no weights."""
    with torch.device("meta"):
        decoder = Decoder(spec)
    decoder.inv_freq = inverse_frequencies(spec).to(device)
    return decoder


def run(decoder: Decoder, layer: Layer, x: Tensor) -> Tensor:
    """Run texts x [B, S, E] through a layer, from position 0 on."""
    step, past = _step(decoder, x)
    out: Tensor = layer(x, step, past)[0]
    return out


def _step(decoder: Decoder, x: Tensor) -> tuple[Step, list[Tensor]]:
    """What a layer needs to read all of x [B, S, E] in one step, into a ring that never wraps."""
    spec, (count, length) = decoder.spec, x.shape[:2]
    past = torch.zeros(count, spec.num_key_value_heads, length, spec.head_dim, device=x.device)
    positions = torch.arange(length, device=x.device).expand(count, -1)
    step = decoder.prepare(positions, [past] * (2 * spec.num_hidden_layers), x.dtype)
    return step, [past, past]
