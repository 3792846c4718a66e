"""bitsandbytes: values of a table of 16 (nf4, fp4), or int8 with a scale per row.

From bitsandbytes 0.50 (`functional.py`, `QuantState`; `nn/modules.py`, `Int8Params`). In 4 bits the
weight is flattened; the first of two codes lies in the high half of a byte:

    weight                              [N K / 2, 1]    uint8
    weight.quant_map                    [16]            the table
    weight.absmax                       blocks          float32, or uint8 codes of the next two
    weight.nested_quant_map             [256]           with double quantization
    weight.nested_absmax                blocks / 256
    weight.quant_state.bitsandbytes__*  JSON: shape, blocksize, nested_blocksize, nested_offset

    weight = absmax[block] table[code]

In 8 bits, `weight = SCB / 127 code`. The table's values are no multiples of one another, so no
integer codes hold them; they are dequantized.
"""

import json
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from exporter.checkpoint.quantized.parts import FLOAT_TYPES, Module, Tensors, modules
from exporter.checkpoint.quantized.value import Quantized
from exporter.checkpoint.stored import map_tensor
from exporter.checkpoint.weight_source import WeightSource
from exporter.fields import Fields
from graphs.quant_scheme import Scheme

_STATE = "weight.quant_state.bitsandbytes__"
_INT8 = Scheme(codes="int8")


def sources(found: Tensors, fields: Fields) -> dict[str, WeightSource]:
    """Return the source of every quantized weight; `fields` says nothing that the files do not."""
    del fields
    result = {f"{one.name}.weight": _int8(one) for one in modules(found, "SCB")}
    for kind in ("nf4", "fp4"):
        for module in modules(found, _STATE + kind):
            result[f"{module.name}.weight"] = _table(module, kind)
    return result


def _int8(module: Module) -> WeightSource:
    stored, scale = module.part("weight", "I8"), module.part("SCB", *FLOAT_TYPES)
    if len(stored.shape) != 2:
        raise module.unfit("weight", "two dimensions")
    shape = (stored.shape[0], stored.shape[1])
    if scale.shape != shape[:1]:
        raise module.unfit("SCB", f"[{shape[0]}]")

    def read(start: int, stop: int) -> Quantized:
        return Quantized(
            scheme=_INT8, codes=map_tensor(stored)[start:stop],
            scale=map_tensor(scale)[start:stop, None].float() / 127,
        )  # fmt: skip

    return module.source("bitsandbytes int8", shape, ["weight", "SCB"], scheme=_INT8, read=read)


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """What the JSON beside a 4-bit weight says."""

    shape: tuple[int, int]
    block: int
    nested_block: int
    nested_offset: float


def _state(module: Module, part: str) -> _State:
    stored = module.part(part, "U8")
    text = bytes(map_tensor(stored).numpy())
    try:
        values = json.loads(text)
        fields = Fields(values, f"{stored.where.path}, {stored.name}")
        rows, columns = values["shape"]
        sizes = (int(rows), int(columns))
        nested = float(values.get("nested_offset", 0.0))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise module.unfit(
            part, f"JSON with the shape and blocksize of a weight ({error})"
        ) from error
    return _State(
        shape=sizes, block=fields.integer("blocksize"),
        nested_block=fields.integer("nested_blocksize", 256), nested_offset=nested,
    )  # fmt: skip


def _table(module: Module, kind: str) -> WeightSource:
    state = _state(module, _STATE + kind)
    rows, columns = state.shape
    count, stored = rows * columns, module.part("weight", "U8")
    if rows < 1 or columns < 1 or math.prod(stored.shape) != -(-count // 2):
        raise module.unfit("weight", f"the codes of {list(state.shape)}, two to a byte")
    blocks = -(-count // state.block)
    absmax = module.part("weight.absmax", "U8", *FLOAT_TYPES)
    if math.prod(absmax.shape) != blocks:
        raise module.unfit("weight.absmax", f"{blocks} blocks of {state.block}")
    table = map_tensor(module.part("weight.quant_map", "float32")).float()
    nested = absmax.where.dtype == "U8"
    parts = ["weight", "weight.absmax", "weight.quant_map", _STATE + kind]
    if nested:
        parts += ["weight.nested_absmax", "weight.nested_quant_map"]
        _check_nested(module, blocks, state)
    if len(table) != 16:
        raise module.unfit("weight.quant_map", "16 values")

    def scales(first: int, last: int) -> Tensor:
        """The scales of blocks `first` to `last`."""
        found = map_tensor(absmax).flatten()[first:last]
        if not nested:
            return found.float()
        outer = map_tensor(module.part("weight.nested_absmax")).float()
        codes = map_tensor(module.part("weight.nested_quant_map")).float()
        at = torch.arange(first, last) // state.nested_block
        return codes[found.long()] * outer[at] + state.nested_offset

    def read(start: int, stop: int) -> Tensor:
        begin, end = start * columns, stop * columns  # among all values
        data = map_tensor(stored).flatten()[begin // 2 : -(-end // 2)]
        codes = torch.stack([data >> 4, data & 0xF], -1).flatten()
        codes = codes[begin % 2 : begin % 2 + end - begin]
        first = begin // state.block
        found = scales(first, -(-end // state.block))
        at = torch.arange(begin, end) // state.block - first
        return (table[codes.int()] * found[at]).view(stop - start, columns)

    why = f"the values of {kind} come from a table, not from integers"
    label = f"bitsandbytes {kind}, blocks of {state.block}"
    return module.source(label, state.shape, parts, scheme=None, read=read, why=why)


def _check_nested(module: Module, blocks: int, state: _State) -> None:
    outer = module.part("weight.nested_absmax", *FLOAT_TYPES)
    if math.prod(outer.shape) != -(-blocks // state.nested_block):
        raise module.unfit("weight.nested_absmax", f"{-(-blocks // state.nested_block)} scales")
    if math.prod(module.part("weight.nested_quant_map", *FLOAT_TYPES).shape) != 256:
        raise module.unfit("weight.nested_quant_map", "256 values")
