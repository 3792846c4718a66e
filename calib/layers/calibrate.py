"""From samples of text to a table, one decoder layer at a time. Knows no command line.

Only one layer's weights are held, and the samples lie in files between layers, so neither memory
nor the time of a restart grows with the number of layers.
"""

import platform
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib.layers import work_directory
from calib.layers.layer_pass import (
    FROM_FILE,
    LayerPass,
    float_layer,
    install_weights,
    tensor_in_file,
)
from calib.layers.mixed_precision import Budget, keep_worst
from calib.layers.samples import Samples
from calib.methods.decide import Task, decide, methods
from calib.methods.input_ranges import CALIBRATORS
from calib.methods.observation import Observer
from exporter.checkpoint.open import Checkpoint
from exporter.decoder.model import load_decoder
from exporter.quantization.calibration_table import CalibrationTable
from exporter.quantization.recipe import SMOOTHING, Recipe
from graphs.errors import UsageError
from graphs.quant_scheme import BLOCKS, Offset, Scheme, default_scheme, groups, layer_groups
from graphs.spec import ModelSpec
from runtime.system.progress import Advance, Stage, silent

PRECISIONS = ("int8", "int8wo", "int4wo", "fp8")
QUANTIZED, FLOAT = "quantized", "float"  # the streams of samples
STAGES = 5  # passes of the samples through a layer: before each of four groups, and out


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationOptions:
    """What the user may choose. None takes the default of the precision or of the machine."""

    precision: str
    method: str | None = None
    block: int | None = None
    offset: Offset = "none"
    calibrator: str = "mse"
    budget: Budget = field(default_factory=Budget)
    device: str | None = None

    def __post_init__(self) -> None:
        _require("--precision", self.precision, PRECISIONS)
        _require("--method", self.method_or_default, methods(self.precision))
        _require("--calibrator", self.calibrator, CALIBRATORS)
        if self.block is not None:
            _require("--block", self.block, BLOCKS)

    @property
    def method_or_default(self) -> str:
        """The method's name."""
        return self.method or next(iter(methods(self.precision)))

    @property
    def scheme(self) -> Scheme:
        """What every linear of the layers becomes."""
        return default_scheme(self.precision, block=self.block, offset=self.offset)

    def to_json(self) -> dict[str, Any]:
        """What decides the numbers of a group, as plain data; the budget does not."""
        return {"precision": self.precision, "method": self.method_or_default,
                "calibrator": self.calibrator, "scheme": self.scheme.to_json()}  # fmt: skip


def calibrate(
    checkpoint: Checkpoint, samples: Samples, options: CalibrationOptions, directory: Path,
    stage: Stage = silent,
) -> CalibrationTable:  # fmt: skip
    """Decide the numbers of every linear of the layers.

    `directory` keeps what is finished; called again with the same arguments, the work goes on
    after the last finished layer, and the table is the same to the byte. It is left there.
    """
    spec = checkpoint.spec
    device = choose_device(options.device)
    with stage("Reading the checkpoint", None):
        fingerprint = checkpoint.fingerprint()
    plan = {"checkpoint": fingerprint, "data": dict(samples.data), "options": options.to_json(),
            "samples": samples.digest, "versions": versions()}  # fmt: skip
    with work_directory.opened(directory, plan) as state, torch.inference_mode():
        per_layer = STAGES * samples.ids.numel()
        with stage("Calibrating", spec.num_hidden_layers * per_layer) as advance:
            done = state.finished()
            advance(done * per_layer)
            if done == 0:
                _embed(checkpoint, samples, streams(options), state)
            for index in range(done, spec.num_hidden_layers):
                _calibrate_layer(checkpoint, index, samples, options, state, device, advance)
        layers = [state.layer(index) for index in range(spec.num_hidden_layers)]
        recipe = Recipe(
            spec=spec, activation="float16",
            schemes={n: options.scheme for group in groups(spec) for n in group.readers},
            tensors={name: value for layer in layers for name, value in layer.tensors.items()},
        )  # fmt: skip
        facts: dict[str, Any] = {
            "coverage": samples.coverage(spec),
            "groups": {name: facts for layer in layers for name, facts in layer.facts.items()},
        }
        if options.budget.asks:
            recipe, facts["kept"] = keep_worst(
                recipe, checkpoint.tensor, samples, options.budget, state, device, stage
            )
    return CalibrationTable(
        precision=options.precision, method=options.method_or_default, checkpoint=fingerprint,
        data=samples.data, versions=versions(), schemes=recipe.schemes, tensors=recipe.tensors,
        facts=facts,
    )  # fmt: skip


def choose_device(name: str | None) -> torch.device:
    """The device asked for, else a GPU that PyTorch can use, else the CPU."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"--device is {name!r}, which PyTorch cannot use here ({error}). Give cpu, or leave it "
            "out."
        ) from error
    return torch.device(name)


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    return {"python": platform.python_version(), "mistralc": version("mistralc"),
            "torch": torch.__version__}  # fmt: skip


def _calibrate_layer(
    checkpoint: Checkpoint, index: int, samples: Samples, options: CalibrationOptions,
    state: work_directory.Work, device: torch.device, advance: Advance,
) -> None:  # fmt: skip
    spec, (count, length) = checkpoint.spec, samples.ids.shape
    method, used = methods(options.precision)[options.method_or_default], streams(options)
    weights = {name: checkpoint.tensor(name) for name in _layer_weights(spec, index)}
    decoder = load_decoder(spec, checkpoint.tensor, only=(), device=device)
    passes = {}
    for stream in used:
        before, after = state.samples(stream, index), state.scratch(f"{stream}-residual")
        shutil.copyfile(before, after)
        residual = tensor_in_file(after, count, length, spec.hidden_size)
        passes[stream] = LayerPass(
            decoder=decoder, residual=residual, pending=state.scratch(f"{stream}-pending"),
            device=device,
        )  # fmt: skip
    layers = {s: float_layer(spec, index, weights.__getitem__, device) for s in used}
    tensors: dict[str, Tensor] = {}
    facts = {}
    schemes = {name: options.scheme for group in layer_groups(index) for name in group.readers}
    recipe = Recipe(spec=spec, activation="float16", schemes=schemes)
    for number, group in enumerate(layer_groups(index)):
        width = weights[group.readers[0]].shape[1]
        observer = Observer(width, samples.ids.numel(), length, device)
        for piece in passes[QUANTIZED].pieces():
            inputs = {s: passes[s].group_input(layers[s], number, piece) for s in used}
            observer.add(inputs[QUANTIZED], inputs.get(FLOAT))
            advance(samples.ids[piece].numel())
        task = Task(spec=spec, group=group, scheme=options.scheme, method=method,
                    calibrator=options.calibrator, weight=weights.__getitem__)  # fmt: skip
        facts[group.name] = decide(task, observer.finish(), tensors)
        smoothing = tensors.get(group.name + SMOOTHING)
        if smoothing is not None and number in FROM_FILE:
            passes[QUANTIZED].divide_pending(smoothing)
        names = (*group.readers, group.producer)
        install_weights(
            layers[QUANTIZED], replace(recipe, tensors=tensors), names, weights.__getitem__
        )
    for piece in passes[QUANTIZED].pieces():
        for stream in used:
            passes[stream].finish(layers[stream], piece)
        advance(samples.ids[piece].numel())
    state.finish(index, work_directory.Layer(tensors=tensors, facts=facts),
                 {s: state.scratch(f"{s}-residual") for s in used})  # fmt: skip


def _layer_weights(spec: ModelSpec, index: int) -> list[str]:
    prefix = f"model.layers.{index}."
    return [name for name in spec.weight_shapes() if name.startswith(prefix)]


def streams(options: CalibrationOptions) -> tuple[str, ...]:
    """The streams of samples: those of the quantized model, and of the float one if asked for."""
    method = methods(options.precision)[options.method_or_default]
    return (QUANTIZED, FLOAT) if method.drift else (QUANTIZED,)


def _embed(
    checkpoint: Checkpoint, samples: Samples, used: tuple[str, ...], state: work_directory.Work
) -> None:
    """Write the streams as they enter the first layer."""
    decoder = load_decoder(checkpoint.spec, checkpoint.tensor, only={"model.embed_tokens"})
    for stream in used:
        path = state.scratch(stream)
        path.unlink(missing_ok=True)
        values = tensor_in_file(path, *samples.ids.shape, checkpoint.spec.hidden_size)
        for row, ids in zip(values, samples.ids, strict=True):
            row.copy_(decoder.embed(ids))
        path.rename(state.samples(stream, 0))


def _require(option: str, value: object, known: Collection[object]) -> None:
    if value not in known:
        names = ", ".join(map(str, known))
        raise UsageError(f"{option} is {value!r}; one of {names} is expected.")
