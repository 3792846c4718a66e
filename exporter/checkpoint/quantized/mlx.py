"""MLX: affine codes of 2 to 8 bits with a scale and a bias for each group of input features.

From mlx 0.32 (`mx.quantize`) and mlx-lm (`utils.py`, `quantize_model`):

    weight  [N, K b / 32]    uint32
    scales  [N, J]
    biases  [N, J]

    weight = scales code + biases
"""

import torch

from exporter.checkpoint.quantized import scaled
from exporter.checkpoint.quantized.bits import unpack
from exporter.checkpoint.quantized.gptq import bits_of
from exporter.checkpoint.quantized.parts import FLOAT_TYPES, WORDS, Module, Tensors, modules
from exporter.checkpoint.quantized.value import Quantized
from exporter.checkpoint.stored import map_tensor
from exporter.checkpoint.weight_source import WeightSource
from exporter.fields import Fields
from graphs.quant_scheme import Scheme

BITS = (2, 3, 4, 5, 6, 8)


def sources(found: Tensors, fields: Fields) -> dict[str, WeightSource]:
    """Return the source of every quantized weight. A module may have settings of its own."""
    mode = fields.text("mode", "affine")
    if mode != "affine":
        raise scaled.unknown(fields.origin, f"MLX {mode}", "MLX affine")
    result = {}
    for module in modules(found, "scales"):
        own = (
            fields.section(module.name)
            if isinstance(fields.values.get(module.name), dict)
            else None
        )
        result[f"{module.name}.weight"] = _source(module, own or fields)
    return result


def _source(module: Module, fields: Fields) -> WeightSource:
    bits, size = bits_of(fields, BITS), fields.integer("group_size")
    words, scales = module.part("weight", *WORDS), module.part("scales", *FLOAT_TYPES)
    biases = module.part("biases", *FLOAT_TYPES)
    if len(words.shape) != 2 or words.shape[1] * 32 % bits:
        raise module.unfit("weight", f"rows of whole codes of {bits} bits")
    rows, columns = words.shape[0], words.shape[1] * 32 // bits
    for part, stored in (("scales", scales), ("biases", biases)):
        if stored.shape != (rows, -(-columns // size)):
            raise module.unfit(part, f"[{rows}, {-(-columns // size)}]")
    middle = 1 << (bits - 1)
    codes = "int4" if bits <= 4 else "int8"
    scheme = Scheme(codes="int4" if codes == "int4" else "int8", block=size, offset="minimum")

    def read(start: int, stop: int) -> Quantized:
        unsigned = unpack(map_tensor(words)[start:stop], bits, columns).to(torch.int16)
        scale = map_tensor(scales)[start:stop].float()
        return Quantized(
            scheme=scheme, codes=(unsigned - middle).to(torch.int8), scale=scale,
            minimum=map_tensor(biases)[start:stop].float() + middle * scale,
        )  # fmt: skip

    label = f"mlx {bits} bits, group {size}"
    return module.source(
        label, (rows, columns), ["weight", "scales", "biases"], scheme=scheme, read=read
    )
