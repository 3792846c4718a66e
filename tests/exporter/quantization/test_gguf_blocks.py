"""Blocks of a GGUF file are stored as they are, without a second rounding."""

from pathlib import Path

import gguf
import pytest

from exporter.checkpoint.open import open_checkpoint
from graphs.quant_scheme import groups
from tests.exporter.checkpoint.edits import write_gguf
from tests.support.make_checkpoint import tiny_spec


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_gguf_blocks_are_read_exactly(kind: str, tmp_path: Path) -> None:
    spec = tiny_spec(num_hidden_layers=1)
    linears = [name for group in groups(spec) for name in group.readers]
    kinds = dict.fromkeys(linears, gguf.GGMLQuantizationType[kind])
    opened = open_checkpoint(write_gguf(tmp_path / "model.gguf", spec, kinds))
    for group in groups(spec):
        for name in group.readers:
            assert opened.dtypes[name] == kind
            quantized = opened.stored[name].quantized
            assert quantized is not None
            exact = quantized[1]().dequantized()
            expected = opened.tensor(
                name
            )  # dequantized by the gguf package, rows in the same order
            # d code + m and d (code - 8) + (m + 8 d) differ by float32 rounding.
            assert (exact - expected).abs().max() <= 4e-7 * expected.abs().max()
