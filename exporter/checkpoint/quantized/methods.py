"""Which quantization a checkpoint has, and the sources of its weights.

The configuration is in `config.json` (`quantization_config`, MLX: `quantization`), in `params.json`
(`quantization`), or in a file of its own: `quantize_config.json` (GPTQ), `quant_config.json` (AWQ),
`hf_quant_config.json` (ModelOpt).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from exporter.checkpoint.quantized import (
    awq,
    bitsandbytes,
    compressed_tensors,
    float8,
    gptq,
    mlx,
    modelopt,
)
from exporter.checkpoint.quantized.parts import Tensors
from exporter.checkpoint.quantized.scaled import unknown
from exporter.checkpoint.weight_source import WeightSource
from exporter.fields import Fields, read_json

READERS: Mapping[str, Callable[[Tensors, Fields], dict[str, WeightSource]]] = {
    "awq": awq.sources,
    "gptq": gptq.sources,
    "compressed-tensors": compressed_tensors.sources,
    "fp8": float8.sources,
    "mistral fp8": float8.native_sources,
    "modelopt": modelopt.sources,
    "bitsandbytes": bitsandbytes.sources,
    "mlx": mlx.sources,
}
_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq",
          "hf_quant_config.json": "modelopt"}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """A method and its settings."""

    method: str
    fields: Fields

    def sources(self, found: Tensors) -> dict[str, WeightSource]:
        """Return the sources of the quantized weights, by the name that a float one would have."""
        return READERS[self.method](found, self.fields)


def quantization_of(directory: Path, config: Fields) -> Quantization | None:
    """Return how a directory's weights are quantized, None if they are not.

    `config` is its config.json or params.json. Raises MistralcError for a method that is not read.
    """
    for key in ("quantization_config", "quantization", "compression_config"):
        section = config.section(key)
        if section is not None:
            return _named(section)
    for name, method in _FILES.items():
        if (directory / name).is_file():
            fields = read_json(directory / name)
            inner = fields.section("quantization") if method == "modelopt" else None
            return Quantization(method=method, fields=inner or fields)
    return None


def _named(section: Fields) -> Quantization:
    values = section.values
    method = values.get("quant_method")
    if method is None:
        if "config_groups" in values:
            method = "compressed-tensors"
        elif "qformat_weight" in values:
            method = "mistral fp8"
        elif values.get("load_in_4bit") or values.get("load_in_8bit"):
            method = "bitsandbytes"
        elif "quant_algo" in values:
            method = "modelopt"
        elif "group_size" in values and "bits" in values:
            method = "mlx"
    name = str(method).lower().replace("_", "-")
    if name.startswith("modelopt"):
        name = "modelopt"
    if name not in READERS:
        known = "AWQ, GPTQ, compressed-tensors, FP8, ModelOpt, bitsandbytes, MLX"
        raise unknown(section.origin, str(method), known)
    return Quantization(method=name, fields=section)
