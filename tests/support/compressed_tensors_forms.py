"""Quantized forms that compressed-tensors itself writes and reads."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.support.quantized_forms import INPUT_SCALE, Form, Made


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The settings of compressed-tensors' `QuantizationArgs` that the forms differ in."""

    bits: int = 8
    kind: str = "int"
    strategy: str = "channel"
    symmetric: bool = True
    size: Any = None  # of a group, or of a block

    def arguments(self) -> dict[str, Any]:
        found = {"num_bits": self.bits, "type": self.kind, "strategy": self.strategy,
                 "symmetric": self.symmetric}  # fmt: skip
        if self.strategy == "group":
            found["group_size"] = self.size
        if self.strategy == "block":
            found["block_structure"] = [self.size, self.size]
        return found


def make(weights: Weights, compressor: str, inputs: bool, weight: Tensor) -> Made:
    """Compress a weight and decompress it again with the library."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights.arguments()))
    low, high = _range(weight, weights)
    scale, zero = calculate_qparams(low, high, scheme.weights)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    library = BaseCompressor.get_value_from_registry(compressor)
    stored = dict(library.compress(state, scheme))
    value = library.decompress(stored, scheme)["weight"].float()
    codes = None
    if "weight" in stored:
        codes = stored["weight"]
    else:
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        codes = unpack_from_int32(stored["weight_packed"], weights.bits, weight.shape)
    if inputs:
        stored["input_scale"] = torch.tensor([INPUT_SCALE])
    return Made(tensors=stored, weight=value, codes=codes)


def _range(weight: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    match weights.strategy:
        case "tensor":
            return weight.amin().view(1), weight.amax().view(1)
        case "channel":
            return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        case "group":
            blocks = weight.unflatten(1, (-1, weights.size))
            return blocks.amin(-1), blocks.amax(-1)
    size = weights.size
    n, k = weight.shape
    tiles = torch.nn.functional.pad(weight, (0, -k % size, 0, -n % size))
    tiles = tiles.unflatten(0, (-1, size)).unflatten(2, (-1, size))
    return tiles.amin((1, 3)), tiles.amax((1, 3))


def _form(
    name: str,
    weights: Weights,
    compressor: str,
    precision: str,
    inputs: dict[str, Any] | None = None,
) -> Form:
    static = inputs is not None and not inputs.get("dynamic")
    config = {
        "quant_method": "compressed-tensors", "format": compressor, "ignore": ["lm_head"],
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights.arguments(),
                        "input_activations": inputs}
        },
    }  # fmt: skip
    return Form(name=name, make=partial(make, weights, compressor, static), config=config,
                precision=precision)  # fmt: skip


_STATIC = {"num_bits": 8, "symmetric": True, "strategy": "tensor", "dynamic": False}
_DYNAMIC = {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}

FORMS = (
    _form("compressed-tensors w4a16 symmetric",
          Weights(bits=4, strategy="group", size=32), "pack-quantized", "int4wo"),
    _form("compressed-tensors w4a16 asymmetric",
          Weights(bits=4, strategy="group", size=128, symmetric=False), "pack-quantized", "int4wo"),
    _form("compressed-tensors w4a16 per channel", Weights(bits=4), "pack-quantized", "int4wo"),
    _form("compressed-tensors w3a16", Weights(bits=3, strategy="group", size=64),
          "pack-quantized", "int4wo"),
    _form("compressed-tensors w8a16", Weights(), "pack-quantized", "int8wo"),
    _form("compressed-tensors w8a8 static", Weights(), "int-quantized", "int8",
          {**_STATIC, "type": "int"}),
    _form("compressed-tensors w8a8 dynamic", Weights(), "int-quantized", "int8wo",
          {**_DYNAMIC, "type": "int"}),
    _form("compressed-tensors w8a8 per tensor", Weights(strategy="tensor"), "int-quantized",
          "int8", {**_STATIC, "type": "int"}),
    _form("compressed-tensors float8 static", Weights(kind="float", strategy="tensor"),
          "float-quantized", "fp8", {**_STATIC, "type": "float"}),
    _form("compressed-tensors float8 dynamic", Weights(kind="float"), "float-quantized", "fp8",
          {**_DYNAMIC, "type": "float"}),
    _form("compressed-tensors float8 in blocks", Weights(kind="float", strategy="block", size=128),
          "float-quantized", "fp8", {**_DYNAMIC, "type": "float"}),
)  # fmt: skip
