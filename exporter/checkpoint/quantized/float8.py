"""FP8 checkpoints of Hugging Face, AutoFP8 and Mistral: float8 weights beside their scales.

From transformers 5 (`integrations/finegrained_fp8.py`): `weight_scale_inv` and `activation_scale`
multiply, in spite of the first name. AutoFP8 and vLLM call them `weight_scale` and `input_scale`,
Mistral's own files `qscale_weight` and `qscale_act`.
"""

from exporter.checkpoint.quantized import scaled
from exporter.checkpoint.quantized.parts import Tensors, modules
from exporter.checkpoint.weight_source import WeightSource
from exporter.fields import Fields

_NAMES = scaled.Names(
    scale=("weight_scale_inv", "weight_scale", "qscale_weight"),
    input_scale=("activation_scale", "input_scale", "qscale_act"),
)


def sources(found: Tensors, fields: Fields) -> dict[str, WeightSource]:
    """Return the source of every float8 weight of a Hugging Face checkpoint."""
    scheme = fields.text("activation_scheme", "dynamic").lower()
    if scheme not in ("static", "dynamic"):
        raise fields.invalid("activation_scheme", "static or dynamic")
    block = fields.values.get("weight_block_size")
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
    ):
        raise fields.invalid("weight_block_size", "two numbers, or null")
    return _sources(found, "fp8", static=scheme == "static",
                    block=None if block is None else (block[0], block[1]))  # fmt: skip


def native_sources(found: Tensors, fields: Fields) -> dict[str, WeightSource]:
    """Return the source of every float8 weight of Mistral's `consolidated.safetensors`."""
    if fields.text("qformat_weight") != "fp8_e4m3":
        raise fields.invalid("qformat_weight", "fp8_e4m3")
    inputs = fields.text("qscheme_act", "TENSOR")
    if inputs not in ("TENSOR", "NO_SCALES"):
        raise fields.invalid("qscheme_act", "TENSOR or NO_SCALES")
    return _sources(found, "mistral fp8", static=inputs == "TENSOR", block=None)


def _sources(
    found: Tensors, method: str, *, static: bool, block: tuple[int, int] | None
) -> dict[str, WeightSource]:
    inputs = scaled.Inputs(label="dynamic inputs", dynamic=True)
    if static:
        inputs = scaled.Inputs(codes="float8e4m3", label="static inputs")
    return {
        f"{module.name}.weight": scaled.source(module, method, inputs, _NAMES, block)
        for scale in _NAMES.scale
        for module in modules(found, scale)
    }
