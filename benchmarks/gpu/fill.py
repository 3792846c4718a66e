"""Make the weights of a bundle that `shapes.py` wrote, on the host that runs it.

Random numbers are drawn on the GPU, so a 7B exists in seconds. Linear weights have a variance of
1 / inputs, so that activations neither vanish nor grow; quantized ones have random codes, with
scales to the same effect.
"""

import argparse
import math
import os
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.variants import SHIPPED, VARIANTS
from exporter.bundle.weights_file import FILE_NAME as WEIGHTS
from exporter.bundle.weights_file import WeightsLayout
from exporter.decoder.devices import DEVICES, reference_device
from exporter.quantization.make_recipe import stored_recipe
from exporter.quantization.recipe import Recipe
from graphs.manifest import FILE_NAME, read_manifest
from graphs.quant_scheme import SCALE, Scheme

BLOCK = 1 << 28  # numbers drawn at once: 1 GiB in float32
GAIN_SPREAD = 0.4  # of a norm's gains, around 1


class Part(NamedTuple):
    """One tensor of the file: how many numbers it has, and what they are."""

    name: str
    begin: int  # its first byte, from the start of the file
    nbytes: int
    kind: str  # `gain`, `weight`, `codes` or `scale`
    inputs: int  # of the linear
    scheme: Scheme | None


class Filled(NamedTuple):
    """A bundle that a step was asked for, with its weights, and the seconds that they took."""

    bundle: Path
    name: str
    variant: str
    device: torch.device
    seconds: float

    @property
    def record(self) -> dict[str, Any]:
        """What a step's line of JSON begins with."""
        return {"bundle": self.name, "variant": self.variant, "fill_s": round(self.seconds, 2)}


def filled(description: str) -> Filled:
    """Make the bundle that this process's command line asks for: SHAPES and options."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("shapes", type=Path)
    parser.add_argument("--variant", choices=VARIANTS, default=SHIPPED)
    parser.add_argument("--weights", type=Path, required=True, help="where to make the bundle")
    parser.add_argument("--device", choices=DEVICES, default="cuda")
    given = parser.parse_args()
    device, name = reference_device(given.device), given.shapes.name
    began = perf_counter()
    bundle = fill(given.shapes, given.variant, given.weights / name, device)
    return Filled(bundle, name, given.variant, device, perf_counter() - began)


def fill(shapes: Path, variant: str, directory: Path, device: torch.device) -> Path:
    """Make a bundle of one variant in `directory` / variant; returns that directory.

    The variants share one file of weights, which is drawn for the first of them.
    """
    weights, bundle = directory / WEIGHTS, directory / variant
    bundle.mkdir(parents=True, exist_ok=True)
    if not weights.exists():
        manifest = read_manifest(shapes)
        partial = weights.with_suffix(".part")
        write_weights(stored_recipe(manifest.build, manifest.quantization), partial, device)
        partial.rename(weights)
    if not (bundle / WEIGHTS).exists():
        os.link(weights, bundle / WEIGHTS)
    (bundle / FILE_NAME).write_bytes((shapes / FILE_NAME).read_bytes())
    (bundle / "model.onnx").write_bytes((shapes / f"{variant}.onnx").read_bytes())
    return bundle


def write_weights(recipe: Recipe, path: Path, device: torch.device) -> None:
    """Write random weights as the recipe stores them; the same ones every time on one device."""
    draw = torch.Generator(device)
    with path.open("wb") as file:
        file.write(WeightsLayout.of(recipe).header)
        for part in sorted(parts(recipe), key=lambda part: part.begin):
            draw.manual_seed(part.begin)
            for numbers in _numbers(part, recipe.stored, draw):
                file.write(numbers.view(torch.uint8).cpu().numpy().data)


def parts(recipe: Recipe) -> Iterator[Part]:
    """Every tensor of the file, in no particular order."""
    layout = WeightsLayout.of(recipe)
    for name, shape in recipe.spec.weight_shapes().items():
        scheme = recipe.schemes.get(name)
        for stored in layout.parts[name]:
            begin, end = layout.ranges[stored.name]
            kind = "gain" if len(shape) == 1 else "weight"
            if scheme is not None:
                kind = "scale" if stored.name.endswith(SCALE) else "codes"
            yield Part(stored.name, begin, end - begin, kind, shape[-1], scheme)


def _numbers(part: Part, stored: torch.dtype, draw: torch.Generator) -> Iterator[Tensor]:
    """Yield the part's numbers as they are stored, up to BLOCK at once."""
    item = 1 if part.kind == "codes" else stored.itemsize
    left = part.nbytes // item
    while left:
        count = min(left, BLOCK)
        left -= count
        if part.kind == "codes":
            yield torch.randint(0, 256, (count,), dtype=torch.uint8, device=draw.device,
                                generator=draw)  # fmt: skip
        else:
            uniform = torch.rand(count, device=draw.device, generator=draw)
            yield _scaled(uniform, part).to(stored)


def _scaled(uniform: Tensor, part: Part) -> Tensor:
    """Turn numbers from 0 to 1 into weights, gains or scales."""
    result: Tensor
    if part.kind == "gain":
        result = 1 + (uniform - 0.5) * GAIN_SPREAD
    elif part.scheme is None:  # the variance of a unit interval is 1/12
        result = (uniform - 0.5) * math.sqrt(12 / part.inputs)
    else:
        deviation = 2**part.scheme.bits / math.sqrt(12)  # of uniform codes
        result = (0.5 + uniform) / deviation / math.sqrt(part.inputs)
    return result
