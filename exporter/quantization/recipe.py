"""Turn a checkpoint's weight into the codes of a bundle.

Calibrated numbers come as the named tensors of a `CalibrationTable`; without one, every weight is
rounded to the nearest code. The streaming export and the PyTorch reference use the same functions,
so both have the same codes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from exporter.checkpoint.quantized.value import Quantized
from exporter.checkpoint.stored import TORCH_FLOATS
from exporter.quantization.packing import unpack_int4
from exporter.quantization.rounding import quantize
from graphs.dtypes import Dtype
from graphs.quant_scheme import SCALE, ZERO_POINT, Scheme, groups
from graphs.spec import ModelSpec
from graphs.targets import CodeLayout

SMOOTHING, INPUT_SCALE = ".smoothing", ".input_scale"  # after a group's name


def smoothed(name: str, weight: Tensor, spec: ModelSpec, tensors: Mapping[str, Tensor]) -> Tensor:
    """Fold the smoothing of `tensors` into one weight, in float32; the model's result is the same.

    Columns of a group's readers are multiplied by the group's scales. The gain, or the rows and the
    bias, of the group's producer are divided by them. With grouped queries a row of v feeds several
    columns of o, which therefore share one scale.
    """
    result = weight
    for group in groups(spec):
        scales = tensors.get(group.name + SMOOTHING)
        if scales is None:
            continue
        if name in group.readers:
            result = result.float() * scales.float()
        elif name in group.divided:
            produced = scales.float()
            if len(produced) != len(weight):  # [H * D], and the rows are [K * D]
                heads = produced.view(spec.num_key_value_heads, -1, spec.head_dim)
                produced = heads[:, 0].flatten()
            result = result.float() / produced.view(-1, *[1] * (weight.dim() - 1))
    return result


def touched(name: str, spec: ModelSpec, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a calibration table's `tensors` change how a weight is quantized."""
    return (
        name in tensors
        or name + SCALE in tensors
        or any(
            group.name + SMOOTHING in tensors and name in (*group.readers, *group.divided)
            for group in groups(spec)
        )
    )


def quantized(
    name: str, weight: Tensor, scheme: Scheme, stored: torch.dtype, tensors: Mapping[str, Tensor]
) -> Quantized:
    """Quantize a smoothed weight [N, K] by the table, or to the nearest codes without one."""
    scale, zero_point = tensors.get(name + SCALE), tensors.get(name + ZERO_POINT)
    codes = tensors.get(name)
    if scale is not None:  # one scale per row serves all blocks of the row
        scale = scale.expand(-1, scheme.blocks(weight.shape[1]))
    if codes is None or scale is None:
        return quantize(weight, scheme, stored, scale, zero_point)
    if scheme.codes == "int4":
        codes = unpack_int4(codes)[:, : weight.shape[1]]
    return Quantized(
        scheme=scheme, codes=codes, scale=scale.to(stored).float(), zero_point=zero_point
    )


def _on(read: Callable[[], Quantized], device: torch.device) -> Quantized:
    return read().to(device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How every weight of a model is stored: as floats of type `activation`, or by its scheme.

    `layouts` has the layouts of codes that are not `onnx`. With `rounds_blocks`, products with
    `nbits` codes round blocks of their input to int8. `repacked` reads the weights whose codes the
    checkpoint already has, so that nothing is rounded a second time.
    """

    spec: ModelSpec
    activation: Dtype
    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    layouts: Mapping[str, CodeLayout] = field(default_factory=dict)
    rounds_blocks: bool = False
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    repacked: Mapping[str, Callable[[], Quantized]] = field(default_factory=dict)

    @property
    def stored(self) -> torch.dtype:
        """The type of stored floats and scales."""
        return TORCH_FLOATS[self.activation]

    def on(self, device: torch.device) -> "Recipe":
        """Return the same recipe with its numbers on `device`."""
        return replace(
            self,
            tensors={name: tensor.to(device) for name, tensor in self.tensors.items()},
            repacked={name: partial(_on, read, device) for name, read in self.repacked.items()},
        )

    def layout(self, name: str) -> CodeLayout:
        """The layout of the codes of a quantized weight."""
        return self.layouts.get(name, "onnx")

    def calibrated(self, name: str) -> bool:
        """Whether a calibration table affects this weight."""
        return touched(name, self.spec, self.tensors)

    def smoothed(self, name: str, weight: Tensor) -> Tensor:
        """Return the smoothed weight, before it is quantized."""
        return smoothed(name, weight, self.spec, self.tensors)

    def quantized(self, name: str, weight: Tensor) -> Quantized:
        """Quantize a smoothed weight [N, K], or some rows of one that no table affects."""
        return quantized(name, weight, self.schemes[name], self.stored, self.tensors)

    def input_scale(self, name: str) -> float:
        """The static scale of the rounded input of the linear `name`."""
        for group in groups(self.spec):
            if name in group.readers:
                return float(self.tensors[group.name + INPUT_SCALE])
        raise KeyError(name)
