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
from graphs.quant_scheme import Scheme

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
    label: str = "inputs in float"


def source(
    module: Module,
    method: str,
    inputs: Inputs,
    names: Names,
    block: tuple[int, int] | None = None,
) -> WeightSource:
    """Return the source of one weight. `block` is the rows and columns that share a scale."""
    stored = module.part("weight", *CODES, "F8_E5M2")
    if len(stored.shape) != 2:
        raise module.unfit("weight", "two dimensions")
    shape = (stored.shape[0], stored.shape[1])
    scale_name = module.first(*names.scale) or names.scale[0]
    scale = module.part(scale_name, *SCALE_TYPES)
    width, label = _block(module, scale_name, shape, block)
    zero = module.get(names.zero_point)
    codes = CODES.get(stored.where.dtype)
    input_name = module.first(*names.input_scale)
    rounded = inputs.codes if input_name is not None and codes == inputs.codes else None
    if width is not None or zero is not None:
        rounded = None  # the targets' integer and float8 products take one scale per row
    pre = module.get("pre_quant_scale", *FLOAT_TYPES)
    scheme = None
    if codes is not None and pre is None:
        offset = "none" if zero is None else "zero_point"
        scheme = Scheme(codes=codes, block=width, offset=offset, activation=rounded)  # type: ignore[arg-type]
    read = _reader(stored, scale, zero, shape, width, scheme, pre)
    parts = ["weight", scale_name, *(n for n in (names.zero_point,) if zero is not None)]
    parts += [input_name] if input_name is not None else []
    parts += ["pre_quant_scale"] if pre is not None else []
    why = (
        ""
        if scheme is not None
        else "inputs are multiplied by a factor per feature (pre_quant_scale)"
    )
    if codes is None:
        why = "the codes are float8 with 5 bits of exponent"
    name = f"{method} {stored.where.dtype}, a scale per {label}, {inputs.label}"
    return module.source(
        name, shape, parts, scheme=scheme, read=read, why=why,
        input_scale=scalar(module.part(input_name)) if rounded and input_name else None,
        scales="float32" if scale.where.dtype == "F8_E8M0" else scale.where.dtype,
    )  # fmt: skip


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
        assumed = Scheme(codes="float8e4m3", block=width)
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
