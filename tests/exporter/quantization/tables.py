"""Calibration tables made by hand. Asserts nothing."""

from dataclasses import replace
from pathlib import Path

import torch

from exporter.checkpoint.open import open_checkpoint
from exporter.quantization.calibration_table import CalibrationTable
from graphs.quant_scheme import default_scheme, groups
from tests.support.make_checkpoint import tiny_spec

SPEC = tiny_spec(window=13)  # shares its trace with other tests


def table_for(path: Path, precision: str, **changed: object) -> CalibrationTable:
    """A table with one input scale for all layers: 0.03, so inputs up to about 4 fit."""
    scheme = default_scheme(precision, block=None)
    names = [name for group in groups(SPEC) for name in group.readers]
    table = CalibrationTable(
        precision=precision, method="by hand",
        checkpoint=open_checkpoint(path).fingerprint(), data={}, versions={},
        schemes=dict.fromkeys(names, scheme),
        tensors={f"{group.name}.input_scale": torch.tensor(0.03) for group in groups(SPEC)},
    )  # fmt: skip
    return replace(table, **changed)


def write_table(table: CalibrationTable, directory: Path) -> Path:
    directory.mkdir()
    table.write(directory)
    return directory
