"""compressed-tensors: what llm-compressor writes, packed integers or one code to a byte.

From compressed-tensors 0.20 (`compressors/pack_quantized`, `compressors/naive_quantized`,
`quantization/quant_config.py`). Packed codes are unsigned, the middle of their range added:

    weight_packed      [N, K b / 32]    int32
    weight_scale       [N, J]
    weight_zero_point  [N b / 32, J]    int32, packed along the rows; only where asymmetric
    weight_shape       [2]              N and K
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from exporter.checkpoint.quantized import scaled
from exporter.checkpoint.quantized.bits import unpack
from exporter.checkpoint.quantized.parts import FLOAT_TYPES, WORDS, Module, Tensors, modules
from exporter.checkpoint.quantized.value import Quantized
from exporter.checkpoint.stored import StoredTensor, map_tensor
from exporter.checkpoint.weight_source import WeightSource
from exporter.fields import Fields
from graphs.dtypes import Codes
from graphs.errors import MistralcError
from graphs.quant_scheme import Scheme

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized",
           "mixed-precision", "dense")  # fmt: skip
_TYPES: Mapping[tuple[str, int], Codes] = {("int", 8): "int8", ("float", 8): "float8e4m3"}


def sources(found: Tensors, fields: Fields) -> dict[str, WeightSource]:
    """Return the source of every quantized weight. Raises MistralcError for what is not read."""
    _check(fields)
    groups = _groups(fields)
    result = {}
    for module in modules(found, "weight_scale"):
        group = _group_of(module.name, groups, fields)
        inputs = _inputs(group)
        weights = group.section("weights")
        if weights is None:
            raise group.invalid("weights", "how the weights are quantized")
        packed = "weight_packed" in module.tensors
        result[f"{module.name}.weight"] = (
            _packed(module, weights, inputs)
            if packed
            else scaled.source(
                module, "compressed-tensors", inputs, scaled.Names(), _block(weights)
            )
        )
    return result


def _check(fields: Fields) -> None:
    formats = [fields, *_groups(fields).values()]
    for one in formats:
        name = one.values.get("format")
        if name is not None and name not in FORMATS:
            raise scaled.unknown(one.origin, f"compressed-tensors {name}", ", ".join(FORMATS))
    sparsity = fields.section("sparsity_config")
    if sparsity is not None and sparsity.values.get("format", "dense") != "dense":
        raise scaled.unknown(fields.origin, "sparse weights", ", ".join(FORMATS))
    for key in ("transform_config",):
        if fields.section(key) is not None:
            raise scaled.unknown(fields.origin, "rotated weights (transform_config)",
                                 ", ".join(FORMATS))  # fmt: skip


def _groups(fields: Fields) -> dict[str, Fields]:
    section = fields.section("config_groups")
    if section is None:
        raise fields.invalid("config_groups", "the quantization of each group of modules")
    found = {}
    for name in section.values:
        group = section.section(name)
        if group is None or not isinstance(group.values.get("targets"), list):
            raise section.invalid(name, "an object with `targets`, `weights` and more")
        found[name] = group
    return found


def _group_of(module: str, groups: Mapping[str, Fields], fields: Fields) -> Fields:
    """Return the group of a module: by its name, then by a pattern, then by its class."""

    def rank(target: Any) -> int:
        text = str(target)
        if text.startswith("re:"):
            return 2 if re.match(text[3:], module) else 0
        if text in (module, module.rpartition(".")[2]) or module.endswith("." + text):
            return 3
        return 1 if text in ("Linear", "Embedding") else 0

    ranked = [(max(map(rank, one.values["targets"]), default=0), one) for one in groups.values()]
    best, group = max(ranked, key=lambda pair: pair[0])
    if not best:
        raise MistralcError(
            f"{fields.origin}: no group of `config_groups` has the module {module} among its "
            "targets, and its weights are quantized; expected one. Use the configuration and "
            "weights of one checkpoint."
        )
    return group


def _inputs(group: Fields) -> scaled.Inputs:
    """How the inputs of a group's linears are rounded."""
    section = group.section("input_activations")
    if section is None:
        return scaled.Inputs()
    kind = (str(section.values.get("type", "int")), section.integer("num_bits", 8))
    if section.values.get("dynamic"):
        return scaled.Inputs(label="dynamic inputs", dynamic=True)
    symmetric = kind[0] == "float" or section.flag("symmetric", default=True)
    if section.values.get("strategy") not in (None, "tensor") or not symmetric:
        return scaled.Inputs(label="inputs that no target rounds so", dynamic=True)
    return scaled.Inputs(codes=_TYPES.get(kind), label="static inputs")


def _block(weights: Fields) -> tuple[int, int] | None:
    structure = weights.values.get("block_structure")
    if isinstance(structure, str):  # older files have "128x128"
        structure = [int(size) for size in structure.split("x") if size.isdigit()]
    if weights.values.get("strategy") == "block":
        sizes = structure if isinstance(structure, list) else []
        if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
            raise weights.invalid("block_structure", "two numbers, the rows and columns of a block")
        return sizes[0], sizes[1]
    if weights.has("group_size") and weights.values["group_size"] != -1:
        return 1, weights.integer("group_size")
    return None


def _packed(module: Module, weights: Fields, inputs: scaled.Inputs) -> WeightSource:
    bits = weights.integer("num_bits", 8)
    if bits > 8 or weights.values.get("type", "int") != "int":
        raise weights.invalid("num_bits", "integers of up to 8 bits")
    words, scale = module.part("weight_packed", *WORDS), module.part("weight_scale", *FLOAT_TYPES)
    rows, columns = _shape(module, words, bits)
    block = _block(weights)
    width = None if block is None else block[1]
    groups = 1 if width is None else -(-columns // width)
    if scale.shape not in ((rows, groups), *([(rows,), (1,)] if width is None else [])):
        raise module.unfit("weight_scale", f"[{rows}, {groups}]")
    zero = _zero_points(module, bits, rows, groups)
    order = module.get("weight_g_idx", *WORDS)
    middle = 1 << (bits - 1)
    scheme = Scheme(codes="int4" if bits <= 4 else "int8", block=width,
                    offset="none" if zero is None else "zero_point")  # fmt: skip

    def read(start: int, stop: int) -> Quantized:
        codes = unpack(map_tensor(words)[start:stop], bits, columns).to(torch.int16) - middle
        scales = map_tensor(scale).float()
        scales = scales.reshape(-1, groups).expand(rows, groups)[start:stop]
        return Quantized(
            scheme=scheme, codes=codes.to(torch.int8), scale=scales,
            zero_point=None if zero is None else zero[start:stop],
        )  # fmt: skip

    parts = [p for p in ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape",
                         "weight_g_idx") if p in module.tensors]  # fmt: skip
    label = f"compressed-tensors {bits} bits, group {width or 'all'}, {inputs.label}"
    if order is None or _trivial(order, width):
        return module.source(
            label, (rows, columns), parts, scheme=scheme, read=read, scales=scale.where.dtype,
            rounds_inputs=inputs.dynamic,
        )  # fmt: skip
    scattered = map_tensor(order).long()

    def read_scattered(start: int, stop: int) -> Tensor:
        weight = read(start, stop)
        codes = weight.codes.float()
        if weight.zero_point is not None:
            codes = codes - weight.zero_point.float()[:, scattered]
        return codes * weight.scale[:, scattered]

    why = "act-order: the input features of a group are scattered"
    return module.source(label, (rows, columns), parts, scheme=None, read=read_scattered, why=why)


def _trivial(order: StoredTensor, width: int | None) -> bool:
    """Whether groups lie side by side; -1 throughout is a checkpoint that has no order."""
    values = map_tensor(order).long()
    plain = torch.arange(len(values)) // (width or len(values))
    return bool((values == -1).all()) or torch.equal(values, plain)


def _shape(module: Module, words: StoredTensor, bits: int) -> tuple[int, int]:
    stored = module.part("weight_shape", "I64", "I32")
    shape = [int(size) for size in map_tensor(stored)]
    if len(shape) != 2 or words.shape != (shape[0], -(-shape[1] * bits // 32)) or shape[0] < 1:
        raise module.unfit("weight_packed", f"the codes of weight_shape, {shape}")
    return shape[0], shape[1]


def _zero_points(module: Module, bits: int, rows: int, groups: int) -> Tensor | None:
    """Return the zero points [N, J] of an asymmetric weight, None if there are none."""
    stored = module.get("weight_zero_point", *WORDS, "I8")
    if stored is None:
        return None
    if stored.where.dtype == "I8":
        if stored.shape != (rows, groups):
            raise module.unfit("weight_zero_point", f"[{rows}, {groups}]")
        zeros = map_tensor(stored)
    else:
        if stored.shape != (-(-rows * bits // 32), groups):
            raise module.unfit("weight_zero_point", f"[{-(-rows * bits // 32)}, {groups}]")
        unsigned = unpack(map_tensor(stored).T, bits, rows).T.to(torch.int16)
        zeros = (unsigned - (1 << (bits - 1))).to(torch.int8)
    return zeros if bool(zeros.any()) else None
