"""AWQ in the layout GEMM: codes packed along the output features, in an order of its own.

From AutoAWQ 0.2.9 (`utils/packing_utils.py`, `modules/linear/gemm.py`). G groups of the K input
features:

    qweight  [K, N / 8]    int32; the eight codes of a word are output features 0 2 4 6 1 3 5 7
    qzeros   [G, N / 8]    the same
    scales   [G, N]        float

    weight[n, k] = scales[g, n] (code - zero[g, n]),    g = k / group size
"""

import torch
from torch import Tensor

from exporter.checkpoint.quantized.bits import unpack
from exporter.checkpoint.quantized.gptq import bits_of
from exporter.checkpoint.quantized.parts import FLOAT_TYPES, WORDS, Module, Tensors, modules
from exporter.checkpoint.quantized.value import Quantized
from exporter.checkpoint.stored import StoredTensor, map_tensor
from exporter.checkpoint.weight_source import WeightSource
from exporter.fields import Fields
from graphs.errors import MistralcError
from graphs.quant_scheme import Scheme

PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of the eight output features in a word
MIDDLE = 8


def sources(found: Tensors, fields: Fields) -> dict[str, WeightSource]:
    """Return the source of every quantized weight. Raises MistralcError for other layouts."""
    layout = str(fields.values.get("version") or fields.values.get("format") or "gemm").lower()
    if layout != "gemm":
        raise MistralcError(
            f"{fields.origin}: the weights are packed as {layout[:40]}; expected gemm. Use the "
            "checkpoint in AWQ's GEMM layout, or the float one with --precision."
        )
    bits_of(fields, (4,), "bits" if fields.has("bits") else "w_bit")
    key = "group_size" if "group_size" in fields.values else "q_group_size"
    group = None if fields.values.get(key) == -1 else fields.integer(key)
    found_modules = modules(found, "qweight")
    return {f"{one.name}.weight": _source(one, group) for one in found_modules}


def _source(module: Module, group: int | None) -> WeightSource:
    words, packed_zeros = module.part("qweight", *WORDS), module.part("qzeros", *WORDS)
    scales = module.part("scales", *FLOAT_TYPES)
    if len(words.shape) != 2:
        raise module.unfit("qweight", "input features by words of eight output features")
    columns, rows = words.shape[0], words.shape[1] * 8
    groups = 1 if group is None else -(-columns // group)
    if scales.shape != (groups, rows):
        raise module.unfit("scales", f"[{groups}, {rows}]")
    if packed_zeros.shape != (groups, rows // 8):
        raise module.unfit("qzeros", f"[{groups}, {rows // 8}]")
    zeros = _unpacked(packed_zeros, 0, rows)  # [N, G]
    symmetric = not bool(zeros.any())
    scheme = Scheme(codes="int4", block=group, offset="none" if symmetric else "zero_point")

    def read(start: int, stop: int) -> Quantized:
        return Quantized(
            scheme=scheme, codes=_unpacked(words, start, stop),
            scale=map_tensor(scales)[:, start:stop].T.float(),
            zero_point=None if symmetric else zeros[start:stop],
        )  # fmt: skip

    label = f"awq 4 bits, group {group or 'all'}"
    parts = ["qweight", "qzeros", "scales"]
    return module.source(
        label, (rows, columns), parts, scheme=scheme, read=read, scales=scales.where.dtype
    )


def _unpacked(words: StoredTensor, start: int, stop: int) -> Tensor:
    """Return signed codes of output features `start` to `stop`: int8 [n, rows of the words]."""
    first, last = start // 8, -(-stop // 8)
    codes = unpack(map_tensor(words)[:, first:last], 4, (last - first) * 8)  # [K, n]
    codes = codes.unflatten(-1, (-1, 8))[..., list(PLACES)].flatten(-2)
    codes = codes[:, start - first * 8 : stop - first * 8]
    signed: Tensor = codes.T.contiguous().to(torch.int8) - MIDDLE
    return signed
