"""Decide the numbers of one group: smoothing, scales, codes, input scale. Knows no files.

A method answers two questions: which smoothing, and whether codes are rounded to nearest or chosen
by GPTQ to compensate for each other's errors. Everything else follows from the scheme.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calib.methods import awq, smoothquant
from calib.methods.catalogue import Method
from calib.methods.clipping import (
    SCALE_DTYPE,
    block_moments,
    fit_scales,
    output_error,
    refine_scales,
)
from calib.methods.gptq import drift_corrected, gptq_codes
from calib.methods.input_ranges import input_scale, rounding_error
from calib.methods.observation import Observation
from calib.methods.smoothing import tied
from exporter.checkpoint.quantized.value import Quantized
from exporter.quantization.packing import pack_int4
from exporter.quantization.recipe import INPUT_SCALE, SMOOTHING, smoothed
from graphs.dtypes import code_range
from graphs.quant_scheme import SCALE, ZERO_POINT, Group, Scheme
from graphs.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupTask:
    """One group, how to quantize it, and its weights: `weight(canonical name)`."""

    spec: ModelSpec
    group: Group
    scheme: Scheme
    method: Method
    calibrator: str
    weight: Callable[[str], Tensor]


def decide_group(
    task: GroupTask, observation: Observation, tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """Decide the numbers of the task's group and add them to `tensors`, named as in a table.

    `observation` is of the group's input before smoothing; it is changed in place. If smoothing is
    folded into a linear that is already quantized, the scales of that linear in `tensors` are
    divided too. Returns measurements for the report: `error` is the output error as a share of the
    output's power.
    """
    smoothing = _choose_smoothing(task, observation, tensors)
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
        target = drift_corrected(wanted, moment, observation.drift, task.method.drift)
    found = fit_scales(target, block_moments(moment, task.scheme), task.scheme)
    if task.method.gptq:
        found = gptq_codes(target, found, moment)
    else:
        found = refine_scales(target, found, moment)
    error = output_error(found.dequantized() - wanted, moment) + noise
    facts["error"] = error / max(output_error(wanted, moment), torch.finfo().tiny)
    _store(task, found, tensors)
    return facts


def _round_input(
    task: GroupTask, observation: Observation, weight: Tensor, tensors: dict[str, Tensor]
) -> tuple[float, dict[str, Any]]:
    """Decide the scale of the group's input; returns the output error and the measurements."""
    importance = weight.square().sum(0)
    peak = float(observation.peak.max())
    scale = input_scale(observation.rows, peak, task.scheme, task.calibrator, importance)
    tensors[task.group.name + INPUT_SCALE] = torch.tensor(scale)
    noise = rounding_error(observation.rows, task.scheme, scale, importance)
    _, most = code_range(task.scheme.activation or "int8")
    return noise, {"peak": peak, "clipped_at": scale * most}


def _choose_smoothing(
    task: GroupTask, observation: Observation, tensors: Mapping[str, Tensor]
) -> Tensor | None:
    if task.method.smoothing == "none":
        return None
    weight = _readers(task, observation.peak.device, tensors)

    def tie(values: Tensor) -> Tensor:
        return tied(values, task.group, task.spec)

    if task.method.smoothing == "awq":
        return awq.choose_smoothing(weight, observation, task.scheme, tie)
    return smoothquant.choose_smoothing(weight, observation, task.scheme, task.calibrator, tie)


def _readers(task: GroupTask, device: torch.device, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the group's weights stacked along N, with the smoothing decided so far: [N, K]."""
    return torch.cat([
        smoothed(name, task.weight(name).float(), task.spec, tensors).to(device)
        for name in task.group.readers
    ])  # fmt: skip


def _divide_producer(task: GroupTask, tensors: dict[str, Tensor]) -> None:
    """Fold the group's smoothing into its producer's scales, if that is a quantized linear."""
    name = task.group.producer
    scale = tensors.get(name + SCALE)
    if scale is not None:
        only = {task.group.name + SMOOTHING: tensors[task.group.name + SMOOTHING]}
        divided = smoothed(name, scale, task.spec, only)  # scales are [N, J]
        tensors[name + SCALE] = divided.to(SCALE_DTYPE).float()


def _store(task: GroupTask, found: Quantized, tensors: dict[str, Tensor]) -> None:
    """Split the numbers of the stacked readers and store them under each reader's name."""
    start = 0
    for name in task.group.readers:
        end = start + len(task.weight(name))
        tensors[name + SCALE] = found.scale[start:end].cpu()
        if found.zero_point is not None:
            tensors[name + ZERO_POINT] = found.zero_point[start:end].cpu()
        if task.method.gptq:
            codes = found.codes[start:end].cpu()
            tensors[name] = pack_int4(codes) if task.scheme.bits == 4 else codes
        start = end
