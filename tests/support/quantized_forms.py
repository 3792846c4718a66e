"""Small checkpoints in every quantized form, each with the codes and the values that it stands for.

A form takes a weight [N, K] and returns what the format stores of it, its codes, and the weight
that the format's own library computes from them. compressed-tensors makes its own files. The other
layouts are written here, and were each compared once with the library that defines them.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from exporter.families import names as weight_names
from exporter.families.family import Format
from graphs.quant_scheme import groups
from graphs.spec import ModelSpec
from tests.support.make_checkpoint import tiny_spec, to_half_split, write_checkpoint

SPEC = tiny_spec(hidden_size=128, intermediate_size=256, head_dim=32)
"""Wide enough for blocks of 128; two key heads of 32."""

INPUT_SCALE = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a format stores of one weight, by what follows the module's name.

    `codes` are signed, as our schemes have them, None if no scheme holds them.
    """

    tensors: Mapping[str, Tensor]
    weight: Tensor  # [N, K], float32
    codes: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """One quantized form. `config` goes into `key` of config.json, or into `file`."""

    name: str
    make: Callable[[Tensor], Made]
    config: Mapping[str, Any]
    key: str = "quantization_config"
    file: str | None = None
    native: bool = False  # Mistral's own layout
    precision: str | None = None  # that carries the codes on the CPU, None: no precision does
    everything: bool = False  # the embedding and the output layer too


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A written checkpoint, and what each quantized weight stands for, by canonical name."""

    path: Path
    made: Mapping[str, Made] = field(default_factory=dict)


def write_form(folder: Path, form: Form, spec: ModelSpec = SPEC) -> Written:
    """Write a random checkpoint of this form. A fixed seed: all forms hold the same model."""
    kind: Format = "mistral" if form.native else "huggingface"
    path = write_checkpoint(folder, spec, format=kind, dtype="float16")
    file = path / ("consolidated.safetensors" if form.native else "model.safetensors")
    tensors = load_file(file)
    names = [name for group in groups(spec) for name in group.readers]
    if form.everything:
        names += ["model.embed_tokens.weight", "lm_head.weight"]
    made = {}
    for name in names:
        stored = weight_names.stored_name(name, kind, spec)
        one = form.make(tensors.pop(stored).float())
        owner = stored.removesuffix(".weight")
        tensors |= {f"{owner}.{part}": value.contiguous() for part, value in one.tensors.items()}
        heads = weight_names.rotated_heads(spec, name) if form.native else None
        made[name] = one if heads is None else _half_split(one, heads)
    save_file(tensors, file)
    _write_config(path, form)
    return Written(path=path, made=made)


def _half_split(made: Made, heads: int) -> Made:
    split = to_half_split
    codes = made.codes
    if codes is not None:
        codes = split(codes.view(torch.uint8), heads).view(codes.dtype)
    return Made(tensors=made.tensors, weight=split(made.weight, heads), codes=codes)


def _write_config(path: Path, form: Form) -> None:
    if form.file is not None:
        (path / form.file).write_text(json.dumps(form.config))
        return
    config = path / ("params.json" if form.native else "config.json")
    data = json.loads(config.read_text())
    config.write_text(json.dumps(data | {form.key: form.config}))


# Packing


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [..., n] from 0 up into int32 words along the last axis, lowest bits first."""
    n = codes.shape[-1]
    places = torch.arange(bits)
    stream: Tensor = (codes.long().unsqueeze(-1) >> places & 1).flatten(-2)  # [..., n * bits]
    padded: Tensor = torch.nn.functional.pad(stream, (0, -(n * bits) % 32)).unflatten(-1, (-1, 32))
    words: Tensor = (padded << torch.arange(32)).sum(-1)
    signed: Tensor = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return signed


def _grouped(weight: Tensor, group: int) -> Tensor:
    found: Tensor = weight.unflatten(1, (-1, group))  # [N, G, group]
    return found


def _affine(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round to codes from 0 up: scales [N, G] in float16, zero points [N, G], codes [N, K]."""
    blocks = _grouped(weight, group)
    low, high = blocks.amin(-1).clamp_max(0), blocks.amax(-1).clamp_min(0)
    scale = ((high - low) / (2**bits - 1)).half().float()
    zero = (-low / scale).round().clamp(0, 2**bits - 1)
    codes = (blocks / scale[..., None] + zero[..., None]).round().clamp(0, 2**bits - 1)
    return scale, zero, codes.flatten(1)


def _symmetric(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Round to signed codes [N, K]: scales [N, G] in float16."""
    blocks, most = _grouped(weight, group), 2 ** (bits - 1) - 1
    scale = (blocks.abs().amax(-1) / most).half().float()
    codes = (blocks / scale[..., None]).round().clamp(-most - 1, most)
    return scale, codes.flatten(1)


def _spread(scale: Tensor, group: int) -> Tensor:
    return scale.repeat_interleave(group, 1)


# AWQ and GPTQ


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _awq_words(codes: Tensor) -> Tensor:
    """Pack [rows, N] as AutoAWQ's `WQLinear_GEMM.from_linear` does."""
    ordered = codes.unflatten(-1, (-1, 8))[..., list(AWQ_ORDER)].flatten(-2)
    return pack(ordered, 4)


def awq(weight: Tensor, group: int = 32) -> Made:
    scale, zero, codes = _affine(weight, 4, group)
    tensors = {"qweight": _awq_words(codes.T), "qzeros": _awq_words(zero.T),
               "scales": scale.T.half()}  # fmt: skip
    value = _spread(scale, group) * (codes - _spread(zero, group))
    return Made(tensors=tensors, weight=value, codes=(codes - 8).to(torch.int8))


def gptq(
    weight: Tensor, bits: int = 4, group: int = 32, minus: int = 1, *, symmetric: bool = False,
    order: str | None = None,
) -> Made:  # fmt: skip
    """`order` is None, `plain` (g_idx that says nothing new) or `scattered` (act-order)."""
    n, k = weight.shape
    group = k if group == -1 else group
    middle = 1 << (bits - 1)
    arranged = weight
    features = torch.arange(k)
    if order == "scattered":
        features = torch.randperm(k, generator=torch.Generator().manual_seed(1))
        arranged = weight[:, features]
    if symmetric:
        scale, codes = _symmetric(arranged, bits, group)
        codes, zero = codes + middle, torch.full_like(scale, middle)
    else:
        scale, zero, codes = _affine(arranged, bits, group)
    value = _spread(scale, group) * (codes - _spread(zero, group))
    back = torch.argsort(features)
    codes, value = codes[:, back], value[:, back]
    tensors = {
        "qweight": pack(codes, bits).T,
        "qzeros": pack((zero.T - minus) % (2 * middle), bits),
        "scales": scale.T.half(),
        "bias": torch.zeros(n, dtype=torch.float16),
    }
    if order is not None:
        tensors["g_idx"] = (torch.arange(k) // group)[back].to(torch.int32)
    held = None if order == "scattered" else (codes - middle).to(torch.int8)
    return Made(tensors=tensors, weight=value, codes=held)


# One code to a byte


def _float8(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, and the weight that they stand for; `scale` is spread to the weight's shape."""
    codes = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, codes.float() * scale


def float8(
    weight: Tensor, names: tuple[str, str | None] = ("weight_scale", "input_scale"),
    block: int | None = None,
) -> Made:  # fmt: skip
    """Float8 with one scale, or one for each block of rows and columns."""
    if block is None:
        scale = (weight.abs().max() / 448).float()
        spread = scale
    else:
        n, k = weight.shape
        padded = torch.nn.functional.pad(weight, (0, -k % block, 0, -n % block))
        tiles = padded.unflatten(0, (-1, block)).unflatten(2, (-1, block))
        scale = tiles.abs().amax((1, 3)) / 448  # [N / block, K / block]
        spread = scale.repeat_interleave(block, 0)[:n].repeat_interleave(block, 1)[:, :k]
    codes, value = _float8(weight, spread)
    tensors = {"weight": codes, names[0]: scale}
    if names[1] is not None:
        tensors[names[1]] = torch.tensor(INPUT_SCALE)
    return Made(tensors=tensors, weight=value, codes=codes)


def modelopt_int4(weight: Tensor, group: int = 64, *, factors: bool = False) -> Made:
    """Two rows to a byte. With `factors` the input is multiplied by `pre_quant_scale` [K]."""
    before = torch.linspace(0.5, 2, weight.shape[1]).half() if factors else None
    scale, codes = _symmetric(weight if before is None else weight / before, 4, group)
    low, high = (codes[i::2].to(torch.int16) & 0xF for i in (0, 1))
    tensors = {"weight": (low | high << 4).to(torch.uint8), "weight_scale": scale.half()}
    value = _spread(scale, group) * codes
    if before is not None:
        tensors["pre_quant_scale"] = before
        value = value * before.float()
    return Made(tensors=tensors, weight=value,
                codes=None if factors else codes.to(torch.int8))  # fmt: skip


# bitsandbytes


NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
       0.7229568362236023, 1.0)  # fmt: skip
FP4 = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5,
       0.1666666716337204, 0.25, -0.0, -0.0052083334885537624, -0.6666666865348816, -1.0,
       -0.3333333432674408, -0.5, -0.1666666716337204, -0.25)  # fmt: skip


def bnb4(weight: Tensor, kind: str = "nf4", *, nested: bool = False, block: int = 64) -> Made:
    table = torch.tensor(NF4 if kind == "nf4" else FP4)
    blocks = weight.reshape(-1, block)
    absmax = blocks.abs().amax(1)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "float16",
                             "shape": list(weight.shape)}  # fmt: skip
    tensors: dict[str, Tensor] = {}
    if nested:
        offset = absmax.mean()
        map256 = torch.linspace(-1, 1, 256)
        outer = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % 256)).view(-1, 256)
        outer_max = outer.abs().amax(1).clamp_min(1e-8)
        ids = ((outer / outer_max[:, None])[..., None] - map256).abs().argmin(-1)
        codes = ids.flatten()[: len(absmax)]
        tensors |= {"weight.absmax": codes.to(torch.uint8), "weight.nested_absmax": outer_max,
                    "weight.nested_quant_map": map256}  # fmt: skip
        state |= {"nested_blocksize": 256, "nested_dtype": "float32",
                  "nested_offset": float(offset)}  # fmt: skip
        at = torch.arange(len(absmax)) // 256
        absmax = map256[codes] * outer_max[at] + float(offset)
    else:
        tensors["weight.absmax"] = absmax
    ids = ((blocks / absmax[:, None])[..., None] - table).abs().argmin(-1)
    flat = ids.flatten()
    tensors |= {
        "weight": (flat[0::2] << 4 | flat[1::2]).to(torch.uint8)[:, None],
        "weight.quant_map": table,
        f"weight.quant_state.bitsandbytes__{kind}": torch.frombuffer(
            bytearray(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }
    return Made(tensors=tensors, weight=(table[ids] * absmax[:, None]).view(weight.shape))


def bnb8(weight: Tensor) -> Made:
    most = weight.abs().amax(1)
    codes = (weight * 127 / most[:, None]).round().to(torch.int8)
    tensors = {"weight": codes, "SCB": most, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return Made(tensors=tensors, weight=codes.float() * (most / 127)[:, None], codes=codes)


# MLX


def mlx(weight: Tensor, bits: int = 4, group: int = 64) -> Made:
    blocks = _grouped(weight, group)
    low, high = blocks.amin(-1), blocks.amax(-1)
    scale = ((high - low) / (2**bits - 1)).half().float()
    bias = low.half().float()
    codes = ((blocks - bias[..., None]) / scale[..., None]).round().clamp(0, 2**bits - 1).flatten(1)
    tensors = {"weight": pack(codes, bits).view(torch.uint32), "scales": scale.half(),
               "biases": bias.half()}  # fmt: skip
    value = _spread(scale, group) * codes + _spread(bias, group)
    return Made(tensors=tensors, weight=value, codes=(codes - (1 << (bits - 1))).to(torch.int8))


# The forms


def _gptq_config(**more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False} | more


_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
_STATIC_FP8 = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
_MODELOPT = {"producer": {"name": "modelopt", "version": "0.47.0"}}


def _modelopt_config(**settings: Any) -> dict[str, Any]:
    return _MODELOPT | {"quantization": {"exclude_modules": ["lm_head"]} | settings}


FORMS = (
    Form(name="AWQ", make=awq, config=_AWQ, precision="int4wo"),
    Form(name="AWQ, quant_config.json", make=partial(awq, group=64), file="quant_config.json",
         config={"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"},
         precision="int4wo"),
    Form(name="GPTQ symmetric", make=partial(gptq, symmetric=True),
         config=_gptq_config(sym=True), precision="int4wo"),
    Form(name="GPTQ asymmetric", make=partial(gptq, order="plain"),
         config=_gptq_config(desc_act=False), precision="int4wo"),
    Form(name="GPTQ v2", make=partial(gptq, minus=0),
         config=_gptq_config(checkpoint_format="gptq_v2"), precision="int4wo"),
    Form(name="GPTQ act-order", make=partial(gptq, order="scattered"),
         config=_gptq_config(desc_act=True)),
    Form(name="GPTQ, one group", make=partial(gptq, group=-1, symmetric=True),
         config=_gptq_config(group_size=-1, sym=True), precision="int4wo"),
    Form(name="GPTQ 8 bits", make=partial(gptq, bits=8, group=128),
         config=_gptq_config(bits=8, group_size=128), precision="int8wo"),
    Form(name="GPTQ 3 bits", make=partial(gptq, bits=3), config=_gptq_config(bits=3),
         precision="int4wo"),
    Form(name="GPTQ, quantize_config.json", make=partial(gptq, group=128),
         file="quantize_config.json",
         config={"bits": 4, "group_size": 128, "desc_act": False, "sym": False},
         precision="int4wo"),
    Form(name="FP8 static", make=partial(float8, names=("weight_scale_inv", "activation_scale")),
         config=_STATIC_FP8, precision="fp8"),
    Form(name="FP8 static, AutoFP8", make=float8, config=_STATIC_FP8, precision="fp8"),
    Form(name="FP8 in blocks", make=partial(float8, names=("weight_scale_inv", None), block=128),
         config={"quant_method": "fp8", "activation_scheme": "dynamic",
                 "weight_block_size": [128, 128]}, precision="fp8"),
    Form(name="FP8, Mistral's own", native=True, key="quantization",
         make=partial(float8, names=("qscale_weight", "qscale_act")),
         config={"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}, precision="fp8"),
    Form(name="ModelOpt FP8", make=float8, file="hf_quant_config.json",
         config=_modelopt_config(quant_algo="FP8", kv_cache_quant_algo=None), precision="fp8"),
    Form(name="ModelOpt INT4 AWQ", make=modelopt_int4, file="hf_quant_config.json",
         config=_modelopt_config(quant_algo="W4A16_AWQ", group_size=64), precision="int4wo"),
    Form(name="ModelOpt INT4 AWQ with factors", make=partial(modelopt_int4, factors=True),
         file="hf_quant_config.json",
         config=_modelopt_config(quant_algo="W4A16_AWQ", group_size=64, pre_quant_scale=True)),
    Form(name="bitsandbytes nf4", make=bnb4,
         config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
    Form(name="bitsandbytes nf4, doubly quantized", make=partial(bnb4, nested=True),
         config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
    Form(name="bitsandbytes fp4", make=partial(bnb4, kind="fp4"), config={"load_in_4bit": True}),
    Form(name="bitsandbytes int8", make=bnb8,
         config={"quant_method": "bitsandbytes", "load_in_8bit": True}, precision="int8wo"),
    Form(name="MLX 4 bits", make=mlx, key="quantization", everything=True,
         config={"bits": 4, "group_size": 64}, precision="int4wo"),
    Form(name="MLX 8 bits", make=partial(mlx, bits=8, group=32), key="quantization",
         everything=True, config={"bits": 8, "group_size": 32, "mode": "affine"},
         precision="int8wo"),
)  # fmt: skip
