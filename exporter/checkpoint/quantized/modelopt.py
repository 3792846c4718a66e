"""NVIDIA ModelOpt's Hugging Face export: FP8, INT8 and INT4 AWQ.

From nvidia-modelopt 0.47 (`torch/export/quant_utils.py`, `convert_hf_config.py`). INT4 AWQ packs
two rows into one, output feature 2i in the low half of a byte and 2i + 1 in the high one:

    weight           [N / 2, K]    uint8, signed codes
    weight_scale     [N, J]
    pre_quant_scale  [K]           what the input is multiplied by; mostly folded into a norm
"""

import torch
from torch import Tensor

from exporter.checkpoint.quantized import scaled
from exporter.checkpoint.quantized.parts import FLOAT_TYPES, Module, Tensors, modules
from exporter.checkpoint.quantized.value import Quantized
from exporter.checkpoint.stored import map_tensor
from exporter.checkpoint.weight_source import WeightSource
from exporter.fields import Fields
from graphs.dtypes import Codes
from graphs.quant_scheme import Scheme

_STATIC: dict[str, Codes] = {"FP8": "float8e4m3", "W8A8_SQ_PER_CHANNEL": "int8"}
_KNOWN = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "W4A16_AWQ", "W8A16",
          "W8A8_SQ_PER_CHANNEL")  # fmt: skip


def sources(found: Tensors, fields: Fields) -> dict[str, WeightSource]:
    """Return the source of every quantized weight. Raises MistralcError for other algorithms."""
    algorithm = fields.text("quant_algo", "").upper()
    if algorithm not in _KNOWN:
        raise scaled.unknown(fields.origin, f"ModelOpt {algorithm or 'mixed'}", ", ".join(_KNOWN))
    inputs = scaled.Inputs(codes=_STATIC.get(algorithm), label="static inputs")
    if algorithm not in _STATIC:
        dynamic = algorithm == "FP8_PER_CHANNEL_PER_TOKEN"
        inputs = scaled.Inputs(
            label="dynamic inputs" if dynamic else "inputs in float", dynamic=dynamic
        )
    size = fields.integer("group_size", 128)
    block = (size, size) if algorithm == "FP8_PB_WO" else None
    return {
        f"{module.name}.weight": _packed(module, size)
        if module.part("weight").where.dtype == "U8"
        else scaled.source(module, f"modelopt {algorithm}", inputs, scaled.Names(), block)
        for module in modules(found, "weight_scale")
    }


def _packed(module: Module, size: int) -> WeightSource:
    stored, scale = module.part("weight", "U8"), module.part("weight_scale", *FLOAT_TYPES)
    if len(stored.shape) != 2:
        raise module.unfit("weight", "two dimensions")
    rows, columns = stored.shape[0] * 2, stored.shape[1]
    if scale.shape != (rows, -(-columns // size)):
        raise module.unfit("weight_scale", f"[{rows}, {-(-columns // size)}]")
    pre = module.get("pre_quant_scale", *FLOAT_TYPES)
    scheme = Scheme(codes="int4", block=size)

    def read(start: int, stop: int) -> Quantized:
        first, last = start // 2, -(-stop // 2)
        data = map_tensor(stored)[first:last]
        halves = torch.stack([data & 0xF, data >> 4], dim=1).flatten(0, 1).to(torch.int8)  # [n, K]
        codes = torch.where(halves > 7, halves - 16, halves)
        return Quantized(
            scheme=scheme, codes=codes[start - 2 * first : stop - 2 * first],
            scale=map_tensor(scale)[start:stop].float(),
        )  # fmt: skip

    def read_floats(start: int, stop: int) -> Tensor:
        weight = read(start, stop).dequantized()
        return weight if pre is None else weight * map_tensor(pre).float()

    label = f"modelopt 4 bits, group {size}"
    parts = ["weight", "weight_scale", *(["pre_quant_scale"] if pre is not None else [])]
    if pre is None:
        return module.source(
            label, (rows, columns), parts, scheme=scheme, read=read, scales=scale.where.dtype
        )
    why = "inputs are multiplied by a factor per feature (pre_quant_scale)"
    return module.source(label, (rows, columns), parts, scheme=None, read=read_floats, why=why)
