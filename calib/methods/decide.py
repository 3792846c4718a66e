"""What to do with one group: smoothing, scales, codes, the input's scale. Knows no files.

A method is a choice for each of two questions: which smoothing, and whether codes are the nearest
ones or make up for each other's errors. Everything else follows from the scheme.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from calib.methods import awq, smoothquant
from calib.methods.clipping import STORED, fit, judge, output_error, settle
from calib.methods.gptq import compensated, corrected
from calib.methods.input_ranges import input_scale, rounding_error
from calib.methods.observation import Observation
from calib.methods.smoothing import tied
from exporter.quantization.packing import pack_int4
from exporter.quantization.recipe import INPUT_SCALE, SMOOTHING, smoothed
from exporter.quantization.rounding import Quantized
from graphs.dtypes import code_range
from graphs.quant_scheme import SCALE, ZERO_POINT, Group, Scheme
from graphs.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How a group's numbers are decided.

    `compensate` is GPTQ; `drift` the share, 0 to 1, of what earlier groups did wrong that it makes
    up for. That helps GPTQ alone, and was seen to cost a third of SmolLM2's perplexity where inputs
    are smoothed and rounded.
    """

    smoothing: Literal["none", "awq", "smoothquant"] = "none"
    compensate: bool = False
    drift: float = 0.0


WEIGHTS_ONLY: Mapping[str, Method] = {
    "gptq": Method(compensate=True, drift=1.0),
    "awq+gptq": Method(smoothing="awq", compensate=True),
    "awq": Method(smoothing="awq"),
}
ROUNDED_INPUTS: Mapping[str, Method] = {
    "smoothquant+gptq": Method(smoothing="smoothquant", compensate=True),
    "smoothquant": Method(smoothing="smoothquant"),
    "nearest": Method(),
}


def methods(precision: str) -> Mapping[str, Method]:
    """The methods that a precision may be calibrated with, by name, the default first."""
    return WEIGHTS_ONLY if precision.endswith("wo") else ROUNDED_INPUTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One group, what is to become of it, and where its weights are: `weight(canonical name)`."""

    spec: ModelSpec
    group: Group
    scheme: Scheme
    method: Method
    calibrator: str
    weight: Callable[[str], Tensor]


def decide(task: Task, observation: Observation, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Decide the numbers of the task's group and put them into `tensors`, named as in a table.

    `observation` is of the group's input without smoothing. Where smoothing is folded into a
    linear, the scales of that linear, in `tensors` already, are divided as its rows are. Returns
    measurements for the report.
    """
    smoothing = _smoothing(task, observation, tensors)
    if smoothing is not None:
        tensors[task.group.name + SMOOTHING] = smoothing.cpu()
        observation.divide(smoothing)
        _divide_producer(task, tensors)
    moment = observation.second_moment
    wanted = target = _readers(task, observation.peak.device, tensors)  # [N, K]
    noise, facts = 0.0, dict[str, Any]()
    if task.scheme.activation is not None:
        noise, facts = _round_input(task, observation, wanted, tensors)
    if observation.drift is not None and task.method.drift:
        target = corrected(wanted, moment, observation.drift, task.method.drift)
    found = fit(target, judge(moment, task.scheme), task.scheme)
    if task.method.compensate:
        found = compensated(target, found, moment)
    else:
        found = settle(target, found, moment)
    error = output_error(found.dequantized() - wanted, moment) + noise
    facts["error"] = error / max(output_error(wanted, moment), torch.finfo().tiny)
    _store(task, found, tensors)
    return facts


def _round_input(
    task: Task, observation: Observation, weight: Tensor, tensors: dict[str, Tensor]
) -> tuple[float, dict[str, Any]]:
    """Decide the scale of the group's input; returns what rounding costs, and measurements."""
    importance = weight.square().sum(0)
    peak = float(observation.peak.max())
    scale = input_scale(observation.rows, peak, task.scheme, task.calibrator, importance)
    tensors[task.group.name + INPUT_SCALE] = torch.tensor(scale)
    noise = rounding_error(observation.rows, task.scheme, scale, importance)
    _, most = code_range(task.scheme.activation or "int8")
    return noise, {"peak": peak, "clipped_at": scale * most}


def _smoothing(
    task: Task, observation: Observation, tensors: Mapping[str, Tensor]
) -> Tensor | None:
    if task.method.smoothing == "none":
        return None
    weight = _readers(task, observation.peak.device, tensors)

    def tie(values: Tensor) -> Tensor:
        return tied(values, task.group, task.spec)

    if task.method.smoothing == "awq":
        return awq.smoothing(weight, observation, task.scheme, tie)
    return smoothquant.smoothing(weight, observation, task.scheme, task.calibrator, tie)


def _readers(task: Task, device: torch.device, tensors: Mapping[str, Tensor]) -> Tensor:
    """The weights of the group one above the other, smoothed by what was decided: [N, K]."""
    return torch.cat([
        smoothed(name, task.weight(name).float(), task.spec, tensors).to(device)
        for name in task.group.readers
    ])  # fmt: skip


def _divide_producer(task: Task, tensors: dict[str, Tensor]) -> None:
    """Divide the scales of a linear that smoothing was folded into after it was decided."""
    name = task.group.producer
    scale = tensors.get(name + SCALE)
    if scale is not None:
        only = {task.group.name + SMOOTHING: tensors[task.group.name + SMOOTHING]}
        divided = smoothed(name, scale, task.spec, only)  # a scale has the rows of its weight
        tensors[name + SCALE] = divided.to(STORED).float()


def _store(task: Task, found: Quantized, tensors: dict[str, Tensor]) -> None:
    """Put scales, zero points and codes under the names of the stacked readers."""
    start = 0
    for name in task.group.readers:
        end = start + len(task.weight(name))
        tensors[name + SCALE] = found.scale[start:end].cpu()
        if found.zero_point is not None:
            tensors[name + ZERO_POINT] = found.zero_point[start:end].cpu()
        if task.method.compensate:
            codes = found.codes[start:end].cpu()
            tensors[name] = pack_int4(codes) if task.scheme.codes == "int4" else codes
        start = end
