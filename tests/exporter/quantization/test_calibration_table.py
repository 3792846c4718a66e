"""Calibration tables that do not fit the export are refused."""

from pathlib import Path

import pytest

from exporter.export import ExportOptions, export
from exporter.quantization.calibration_table import CalibrationTable
from graphs.errors import MistralcError, UsageError
from tests.exporter.quantization.tables import table_for, write_table


def test_a_table_of_another_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    table = write_table(table_for(checkpoint, "int8", checkpoint="f" * 64), tmp_path / "table")
    with pytest.raises(MistralcError, match=r"fingerprint ffffffffffff…, and"):
        export(str(checkpoint), tmp_path / "b", ExportOptions(precision="int8", calibration=table))


def test_a_table_of_another_precision_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    table = write_table(table_for(checkpoint, "fp8"), tmp_path / "table")
    with pytest.raises(UsageError, match="is for fp8, but --precision is int8"):
        export(str(checkpoint), tmp_path / "b", ExportOptions(precision="int8", calibration=table))


@pytest.mark.parametrize("name", ["calibration.json", "calibration.safetensors"])
def test_a_damaged_table_is_refused(checkpoint: Path, tmp_path: Path, name: str) -> None:
    table = write_table(table_for(checkpoint, "int8"), tmp_path / "table")
    assert CalibrationTable.read(table).fingerprint == table_for(checkpoint, "int8").fingerprint
    data = bytearray((table / name).read_bytes())
    data[len(data) // 2] ^= 1
    (table / name).write_bytes(data)
    with pytest.raises(MistralcError, match="is not a calibration table"):
        CalibrationTable.read(table)
