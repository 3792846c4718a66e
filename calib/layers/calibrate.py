"""Calibrate a checkpoint into a table, one decoder layer at a time. Knows no command line.

Only one layer's weights are in memory, and the samples are kept in files between layers. So memory
does not grow with the number of layers, and a stopped run resumes after its last finished layer.
"""

import platform
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib.layers.layer_pass import (
    FROM_FILE,
    LayerPass,
    float_layer,
    install_weights,
    tensor_in_file,
)
from calib.layers.mixed_precision import keep_worst
from calib.layers.samples import Samples
from calib.layers.work_directory import LayerResult, WorkDirectory, open_work_directory
from calib.methods.decide import GroupTask, decide_group
from calib.methods.observation import Observer
from calib.options import CalibrationOptions
from exporter.checkpoint.open import Checkpoint
from exporter.decoder.load import load_decoder
from exporter.quantization.calibration_table import CalibrationTable
from exporter.quantization.recipe import SMOOTHING, Recipe
from graphs.errors import UsageError
from graphs.quant_scheme import groups, layer_groups
from runtime.system.progress import Advance, Stage, silent
from runtime.system.release import mistralc_version

QUANTIZED, FLOAT = "quantized", "float"  # streams of samples: through which model they run
STEPS = 5  # times that the samples advance in a layer: to each of four groups, and to its end


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """Everything that one calibration works with."""

    checkpoint: Checkpoint
    samples: Samples
    options: CalibrationOptions
    work: WorkDirectory
    device: torch.device

    @property
    def streams(self) -> tuple[str, ...]:
        """Streams of samples: QUANTIZED, and FLOAT too if the method corrects drift."""
        return (QUANTIZED, FLOAT) if self.options.chosen_method.drift else (QUANTIZED,)


def calibrate(
    checkpoint: Checkpoint, samples: Samples, options: CalibrationOptions, directory: Path,
    stage: Stage = silent,
) -> CalibrationTable:  # fmt: skip
    """Decide the numbers of every linear of the layers.

    Finished layers are kept in `directory`. Called again with the same arguments, this resumes
    after the last finished layer and returns the same table, bit-identical. The directory is left
    for the caller to delete.
    """
    spec, device = checkpoint.spec, choose_device(options.device)
    with stage("Reading the checkpoint", None):
        fingerprint = checkpoint.fingerprint()
    inputs = {"checkpoint": fingerprint, "data": dict(samples.data), "options": options.to_json(),
              "samples": samples.digest, "versions": versions()}  # fmt: skip
    with open_work_directory(directory, inputs) as work, torch.inference_mode():
        run = _Run(checkpoint=checkpoint, samples=samples, options=options, work=work,
                   device=device)  # fmt: skip
        layers = _calibrate_layers(run, stage)
        recipe = Recipe(
            spec=spec, activation="float16",
            schemes={n: options.scheme for group in groups(spec) for n in group.readers},
            tensors={name: value for layer in layers for name, value in layer.tensors.items()},
        )  # fmt: skip
        facts: dict[str, Any] = {
            "coverage": samples.coverage(spec),
            "groups": {name: facts for layer in layers for name, facts in layer.facts.items()},
        }
        if options.budget.is_set:
            recipe, facts["kept"] = keep_worst(
                recipe, checkpoint.tensor, samples, options.budget, work, device, stage
            )
    return CalibrationTable(
        precision=options.precision, method=options.method_name, checkpoint=fingerprint,
        data=samples.data, versions=versions(), schemes=recipe.schemes, tensors=recipe.tensors,
        facts=facts,
    )  # fmt: skip


def choose_device(name: str | None) -> torch.device:
    """Return the named device, or by default a GPU if PyTorch can use one, else the CPU.

    Raises UsageError if PyTorch cannot use the named device.
    """
    if name is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if found is None else found
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"--device is {name!r}, which PyTorch cannot use here ({error}). Give cpu, or omit "
            "the option."
        ) from error
    return torch.device(name)


def versions() -> dict[str, str]:
    """Return the versions of the software that computes the numbers."""
    return {"python": platform.python_version(), "mistralc": mistralc_version(),
            "torch": torch.__version__}  # fmt: skip


def _calibrate_layers(run: _Run, stage: Stage) -> list[LayerResult]:
    """Calibrate the layers that are not finished yet; returns the results of all layers."""
    layers = run.checkpoint.spec.num_hidden_layers
    steps = STEPS * run.samples.ids.numel()  # of progress, in each layer
    with stage("Calibrating", layers * steps) as advance:
        done = run.work.finished()
        advance(done * steps)
        if done == 0:
            _write_embedded_samples(run)
        for index in range(done, layers):
            _calibrate_layer(run, index, advance)
    return [run.work.layer(index) for index in range(layers)]


def _write_embedded_samples(run: _Run) -> None:
    """Write every stream's samples as they enter the first layer."""
    spec, ids = run.checkpoint.spec, run.samples.ids
    decoder = load_decoder(spec, run.checkpoint.tensor, only={"model.embed_tokens"})
    for stream in run.streams:
        path = run.work.scratch(stream)
        path.unlink(missing_ok=True)
        values = tensor_in_file(path, *ids.shape, spec.hidden_size)  # [n, S, E]
        for row, sample in zip(values, ids, strict=True):
            row.copy_(decoder.embed(sample))
        path.rename(run.work.samples(stream, 0))


def _calibrate_layer(run: _Run, index: int, advance: Advance) -> None:
    spec, ids, options = run.checkpoint.spec, run.samples.ids, run.options
    weights = {name: run.checkpoint.tensor(name) for name in spec.weight_shapes()
               if name.startswith(f"model.layers.{index}.")}  # fmt: skip
    passes = {stream: _layer_pass(run, stream, index) for stream in run.streams}
    layers = {stream: float_layer(spec, index, weights.__getitem__, run.device)
              for stream in run.streams}  # fmt: skip
    tensors: dict[str, Tensor] = {}
    facts = {}
    schemes = {
        name: options.scheme for group in layer_groups(spec, index) for name in group.readers
    }
    recipe = Recipe(spec=spec, activation="float16", schemes=schemes)
    for number, group in enumerate(layer_groups(spec, index)):
        width = weights[group.readers[0]].shape[1]
        observer = Observer(width, ids.numel(), ids.shape[1], run.device)
        for piece in passes[QUANTIZED].pieces():
            inputs = {stream: one.group_input(layers[stream], number, piece)
                      for stream, one in passes.items()}  # fmt: skip
            observer.add(inputs[QUANTIZED], inputs.get(FLOAT))
            advance(ids[piece].numel())
        task = GroupTask(
            spec=spec, group=group, scheme=options.scheme, method=options.chosen_method,
            calibrator=options.calibrator, weight=weights.__getitem__,
        )  # fmt: skip
        facts[group.name] = decide_group(task, observer.finish(), tensors)
        smoothing = tensors.get(group.name + SMOOTHING)
        if smoothing is not None and number in FROM_FILE:
            passes[QUANTIZED].divide_pending(smoothing)
        decided = replace(recipe, tensors=tensors)
        names = (*group.readers, *group.divided)
        install_weights(layers[QUANTIZED], decided, names, weights.__getitem__)
    for piece in passes[QUANTIZED].pieces():
        for stream, one in passes.items():
            one.finish(layers[stream], piece)
        advance(ids[piece].numel())
    run.work.finish(index, LayerResult(tensors=tensors, facts=facts),
                    {stream: _residual_file(run, stream) for stream in passes})  # fmt: skip


def _layer_pass(run: _Run, stream: str, index: int) -> LayerPass:
    """Copy a stream's samples, so that a stopped run still has them, and start their pass."""
    spec, residual = run.checkpoint.spec, _residual_file(run, stream)
    shutil.copyfile(run.work.samples(stream, index), residual)
    return LayerPass(
        decoder=load_decoder(spec, run.checkpoint.tensor, only=(), device=run.device),
        residual=tensor_in_file(residual, *run.samples.ids.shape, spec.hidden_size),
        pending=run.work.scratch(f"{stream}-pending"),
        device=run.device,
    )


def _residual_file(run: _Run, stream: str) -> Path:
    return run.work.scratch(f"{stream}-residual")
