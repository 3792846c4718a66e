"""Synthetic inputs of linears, and decoders with smoothing folded in. Asserts nothing."""

import torch
from torch import Tensor

from calib.methods.observation import Observation, Observer
from exporter.decoder.load import load_decoder
from exporter.decoder.model import Decoder, logits_at
from exporter.quantization.recipe import Recipe
from graphs.spec import ModelSpec
from tests.support import tiny

CPU = torch.device("cpu")


def observed(x: Tensor) -> Observation:
    """The observation of inputs x [T, K]."""
    observer = Observer(x.shape[1], len(x), length=len(x), device=CPU)
    observer.add(x)
    return observer.finish()


def with_outliers(rows: int = 512, features: int = 96, size: float = 30.0) -> Tensor:
    """Correlated inputs; three features are `size` times as large as the others."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(rows, features // 4, generator=generator)
    x = mixed @ torch.randn(features // 4, features, generator=generator) / features**0.5
    x[:, [3, 40, 77]] *= size
    return x


def folded(spec: ModelSpec, tensors: dict[str, Tensor]) -> Decoder:
    """The tiny decoder with the smoothing of `tensors` folded in, unquantized."""
    recipe = Recipe(spec=spec, activation="float32", tensors=tensors)
    weights = tiny.weights(spec)
    return load_decoder(spec, lambda name: recipe.smoothed(name, weights[name]))


def logits(decoder: Decoder, count: int = 24) -> Tensor:
    """Logits [n, V] after each token of a short text."""
    ids = torch.from_numpy(tiny.tokens(decoder.spec, count))
    return logits_at(decoder, ids, torch.arange(count))
