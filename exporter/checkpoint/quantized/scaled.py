"""Weights stored one code to a byte beside their scales: int8 and float8, whoever wrote them.

    weight[n, k] = scale (code - zero point),    one scale for the tensor, a row, a group of a row,
                                                 or a block of rows and columns

Static scales of inputs become the `activation` of the scheme, so that such a checkpoint needs no
calibration.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from exporter.checkpoint.quantized.parts import (
    FLOAT_TYPES,
    Module,
    per_block,
    row_numbers,
    scalar,
)
from exporter.checkpoint.quantized.value import Quantized
from exporter.checkpoint.stored import StoredTensor, map_tensor
from exporter.checkpoint.weight_source import WeightSource
from graphs.dtypes import Codes
from graphs.errors import MistralcError
from graphs.quant_scheme import Offset, Scheme

CODES: dict[str, Codes] = {"I8": "int8", "F8_E4M3": "float8e4m3"}
SCALE_TYPES = (*FLOAT_TYPES, "F8_E8M0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """What a method calls the parts of a module."""

    scale: tuple[str, ...] = ("weight_scale",)
    input_scale: tuple[str, ...] = ("input_scale",)
    zero_point: str = "weight_zero_point"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """How a method rounds the inputs of its linears: statically with one scale, or otherwise."""

    codes: Codes | None = None  # static, one symmetric scale for the whole tensor
    dynamic: bool = False  # with scales of the moment
    label: str = "inputs in float"


def source(
    module: Module, method: str, inputs: Inputs, names: Names,
    block: tuple[int, int] | None = None,
) -> WeightSource:  # fmt: skip
    """Return the source of one weight. `block` is the rows and columns that share a scale."""
    stored = module.part("weight", *CODES, "F8_E5M2")
    if len(stored.shape) != 2:
        raise module.unfit("weight", "two dimensions")
    shape = (stored.shape[0], stored.shape[1])
    scale_name = module.first(*names.scale) or names.scale[0]
    scale, input_name = module.part(scale_name, *SCALE_TYPES), module.first(*names.input_scale)
    width, label = _block(module, scale_name, shape, block)
    zero = _zero_point(module, names.zero_point, scale)
    pre, codes = module.get("pre_quant_scale", *FLOAT_TYPES), CODES.get(stored.where.dtype)
    # Products of rounded inputs take one scale per row.
    rowwise = width is None and zero is None and codes == inputs.codes
    static = inputs.codes if rowwise and input_name is not None else None
    scheme, why = None, ""
    if codes is None:
        why = "the codes are float8 with 5 bits of exponent"
    elif pre is not None:
        why = "inputs are multiplied by a factor per feature (pre_quant_scale)"
    else:
        offset: Offset = "none" if zero is None else "zero_point"
        scheme = Scheme(codes=codes, block=width, offset=offset, activation=static)
    parts = ("weight", scale_name, names.zero_point, input_name or "", "pre_quant_scale")
    return module.source(
        f"{method} {stored.where.dtype}, a scale per {label}, {inputs.label}",
        shape,
        [part for part in parts if part in module.tensors],
        scheme=scheme,
        read=_reader(stored, scale, zero, shape, width, scheme, pre),
        why=why,
        input_scale=scalar(module.part(input_name)) if static and input_name else None,
        rounds_inputs=inputs.dynamic,
        scales=scale.where.dtype if scale.where.dtype in FLOAT_TYPES else "float32",
    )


def _zero_point(module: Module, name: str, scale: StoredTensor) -> StoredTensor | None:
    """Return the zero points of a weight, None if there are none or all are 0."""
    stored = module.get(name, "I8", "F8_E4M3", *FLOAT_TYPES)
    if stored is None or not map_tensor(stored).float().any():
        return None
    if stored.shape != scale.shape or stored.where.dtype != "I8":
        raise module.unfit(name, f"{list(scale.shape)} integers of 8 bits, as the scales")
    return stored


def _block(
    module: Module, scale_name: str, shape: tuple[int, int], block: tuple[int, int] | None
) -> tuple[int | None, str]:
    """Return the columns that share a scale, None for the whole row, and a name for it."""
    scale, (rows, columns) = module.part(scale_name), shape
    size = tuple(scale.shape)
    if scale.where.length == 0:
        raise module.unfit(scale_name, "at least one scale")
    if size in ((), (1,), (1, 1)):
        return None, "tensor"
    if size in ((rows,), (rows, 1)):
        return None, "row"
    if block is not None and size == (-(-rows // block[0]), -(-columns // block[1])):
        return (None if block[1] >= columns else block[1]), f"block of {block[0]} x {block[1]}"
    expected = "one scale, or one for each row"
    if block is not None:
        expected = f"[{-(-rows // block[0])}, {-(-columns // block[1])}], one for each block"
    raise module.unfit(scale_name, expected)


def _reader(
    stored: StoredTensor, scale: StoredTensor, zero: StoredTensor | None, shape: tuple[int, int],
    width: int | None, scheme: Scheme | None, pre: StoredTensor | None,
) -> Callable[[int, int], Quantized] | Callable[[int, int], Tensor]:  # fmt: skip
    def read(start: int, stop: int) -> Quantized:
        rows = row_numbers(start, stop)
        offset = None if zero is None else per_block(map_tensor(zero), rows, shape).to(torch.int8)
        assumed = Scheme(codes="float8e4m3", block=width)  # the codes are multiplied as floats
        return Quantized(
            scheme=scheme or assumed, codes=map_tensor(stored)[start:stop],
            scale=per_block(map_tensor(scale), rows, shape), zero_point=offset,
        )  # fmt: skip

    def read_floats(start: int, stop: int) -> Tensor:
        weight = read(start, stop).dequantized()
        return weight if pre is None else weight * map_tensor(pre).float()

    return read if scheme is not None else read_floats


def unknown(origin: str, what: str, known: str) -> MistralcError:
    """Return the error for a quantization that is not read, for the caller to raise."""
    return MistralcError(
        f"{origin}: the weights are quantized as {what[:60]}; expected one of {known}. Use the "
        "checkpoint that they were made from, and quantize with --precision."
    )
