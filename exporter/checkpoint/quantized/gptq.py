"""GPTQ: codes packed along the input features, a scale and a zero point for each group of them.

From AutoGPTQ 0.7 (`nn_modules/qlinear/qlinear_cuda_old.py`) and GPTQModel 7.7
(`nn_modules/qlinear/__init__.py`). With b bits, G groups of the K input features:

    qweight  [K b / 32, N]    int32, codes of one output feature from the lowest bit on
    qzeros   [G, N b / 32]    int32; `gptq` stores each zero point minus 1, `gptq_v2` as it is
    scales   [G, N]           float
    g_idx    [K]              int32, the group of each input feature; optional

    weight[n, k] = scales[g, n] (code - zero[g, n]),    g = g_idx[k], or k / group size

Act-order quantizes the features that matter most first, so a group's features are scattered unless
the groups were fixed beforehand. Only groups that lie side by side are blocks of a scheme.
"""

import torch
from torch import Tensor

from exporter.checkpoint.quantized.bits import unpack
from exporter.checkpoint.quantized.parts import FLOAT_TYPES, WORDS, Module, Tensors, modules
from exporter.checkpoint.quantized.value import Quantized
from exporter.checkpoint.stored import map_tensor
from exporter.checkpoint.weight_source import WeightSource
from exporter.fields import Fields
from graphs.errors import MistralcError
from graphs.quant_scheme import Scheme

BITS = (2, 3, 4, 8)
FORMATS = {"gptq": 1, "gptq_v2": 0}  # added to a stored zero point


def sources(found: Tensors, fields: Fields) -> dict[str, WeightSource]:
    """Return the source of every quantized weight. Raises MistralcError for other layouts."""
    plus = _zero_offset(fields)
    bits, group = bits_of(fields, BITS), _group_size(fields)
    return {
        f"{module.name}.weight": _source(module, bits, plus, group)
        for module in modules(found, "qweight")
    }


def bits_of(fields: Fields, known: tuple[int, ...], key: str = "bits") -> int:
    """Return the bits of a code. Raises MistralcError for a number that is not `known`."""
    bits = fields.integer(key)
    if bits not in known:
        raise fields.invalid(key, f"one of {', '.join(map(str, known))}")
    return bits


def _zero_offset(fields: Fields) -> int:
    name = str(fields.values.get("checkpoint_format") or fields.values.get("format") or "gptq")
    if fields.values.get("is_marlin_format"):
        name = "marlin"
    if name not in FORMATS:
        raise MistralcError(
            f"{fields.origin}: the weights are packed as {name[:40]}; expected one of "
            f"{', '.join(FORMATS)}, which do not depend on a GPU's kernels. Use the checkpoint "
            "before it was repacked, or the float one with --precision."
        )
    return FORMATS[name]


def _group_size(fields: Fields) -> int | None:
    return None if fields.values.get("group_size") == -1 else fields.integer("group_size")


def _source(module: Module, bits: int, plus: int, group: int | None) -> WeightSource:
    words, packed_zeros = module.part("qweight", *WORDS), module.part("qzeros", *WORDS)
    scales = module.part("scales", *FLOAT_TYPES)
    if len(words.shape) != 2 or words.shape[0] * 32 % bits:
        raise module.unfit("qweight", f"rows of whole codes of {bits} bits")
    columns, rows = words.shape[0] * 32 // bits, words.shape[1]
    groups = 1 if group is None else -(-columns // group)
    if scales.shape != (groups, rows):
        raise module.unfit("scales", f"[{groups}, {rows}]")
    if packed_zeros.shape != (groups, -(-rows * bits // 32)):
        raise module.unfit("qzeros", f"[{groups}, {-(-rows * bits // 32)}]")
    middle = 1 << (bits - 1)  # codes become signed ones
    zeros = unpack(map_tensor(packed_zeros), bits, rows).to(torch.int16)  # [G, N]
    zeros = ((zeros + plus) % (2 * middle) - middle).to(torch.int8)
    symmetric = not bool(zeros.any())
    order = _order(module, columns, group)
    scheme = Scheme(
        codes="int4" if bits <= 4 else "int8", block=group,
        offset="none" if symmetric else "zero_point",
    )  # fmt: skip

    def codes_of(start: int, stop: int) -> Tensor:
        taken = map_tensor(words)[:, start:stop].T  # [n, words]
        return (unpack(taken, bits, columns).to(torch.int16) - middle).to(torch.int8)

    def read(start: int, stop: int) -> Quantized:
        return Quantized(
            scheme=scheme, codes=codes_of(start, stop),
            scale=map_tensor(scales)[:, start:stop].T.float(),
            zero_point=None if symmetric else zeros[:, start:stop].T,
        )  # fmt: skip

    parts = ["qweight", "qzeros", "scales", *(["g_idx"] if "g_idx" in module.tensors else [])]
    label = f"gptq {bits} bits, group {group or 'all'}, zero + {plus}"
    if order is None:
        return module.source(label, (rows, columns), parts, scheme=scheme, read=read,
                             scales=scales.where.dtype)  # fmt: skip
    scattered = order

    def read_scattered(start: int, stop: int) -> Tensor:
        scale = map_tensor(scales)[:, start:stop].T.float()[:, scattered]  # [n, K]
        zero = zeros[:, start:stop].T.float()[:, scattered]
        return scale * (codes_of(start, stop).float() - zero)

    why = "act-order: the input features of a group are scattered"
    return module.source(label, (rows, columns), parts, scheme=None, read=read_scattered, why=why)


def _order(module: Module, columns: int, group: int | None) -> Tensor | None:
    """Return the group of each input feature [K], None if groups lie side by side."""
    stored = module.get("g_idx", *WORDS)
    if stored is None:
        return None
    if stored.shape != (columns,):
        raise module.unfit("g_idx", f"[{columns}]")
    order = map_tensor(stored).long()
    plain = torch.arange(columns) // (group or columns)
    if torch.equal(order, plain):
        return None
    groups = int(plain[-1]) + 1
    if int(order.min()) < 0 or int(order.max()) >= groups:
        raise MistralcError(
            f"{stored.where.path}: {stored.name} names the group {int(order.max())}; expected one "
            f"of {groups}. Download the checkpoint again."
        )
    return order
