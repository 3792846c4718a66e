"""A checkpoint for tests of quantized exports."""

from pathlib import Path

import pytest

from tests.exporter.quantization.tables import SPEC
from tests.support.make_checkpoint import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("quantized") / "checkpoint", SPEC)
