"""Rows, order and values of a weight source: what a family asks of a stored tensor."""

from pathlib import Path

import gguf
import pytest
import torch

from exporter.checkpoint import weight_source
from exporter.checkpoint.gguf_file import read_gguf
from exporter.checkpoint.open import open_checkpoint
from exporter.checkpoint.quantized.gguf_blocks import block_source
from exporter.checkpoint.stored import map_bytes
from exporter.checkpoint.weight_source import WeightSource
from tests.exporter.checkpoint.edits import Q_PROJ, small_spec, write_gguf
from tests.support.make_checkpoint import to_half_split, write_checkpoint


@pytest.fixture(params=["float32", "Q4_0", "Q8_0"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> WeightSource:
    spec = small_spec()  # q_proj has 32 rows: 4 heads of 8
    if request.param == "float32":
        return open_checkpoint(write_checkpoint(tmp_path, spec)).stored[Q_PROJ]
    kinds = {Q_PROJ: gguf.GGMLQuantizationType[request.param]}
    file = read_gguf(write_gguf(tmp_path / "model.gguf", spec, kinds))
    return block_source(file.tensors["blk.0.attn_q.weight"])


@pytest.mark.parametrize(("start", "stop"), [(0, 32), (0, 8), (8, 24), (5, 19), (31, 32)])
def test_some_rows_are_those_rows_of_the_whole(source: WeightSource, start: int, stop: int) -> None:
    part = source.rows(start, stop)
    assert torch.equal(part.read(), source.read()[start:stop])
    assert part.nbytes == source.nbytes * (stop - start) // 32
    if part.quantized is not None:
        assert torch.equal(part.quantized[1]().dequantized(), part.read())
    if source.verbatim is not None:
        assert part.verbatim is not None
        assert torch.equal(map_bytes(part.verbatim), part.read().view(torch.uint8).flatten())


@pytest.mark.parametrize(("start", "stop"), [(0, 32), (0, 8), (8, 24), (5, 19), (31, 32)])
def test_half_split_rows_are_the_same_whole_or_in_parts(
    source: WeightSource, start: int, stop: int
) -> None:
    split = source.half_split(4)
    whole = to_half_split(source.read(), 4)
    assert torch.equal(split.read(), whole)
    part = split.rows(start, stop)
    assert torch.equal(part.read(), whole[start:stop])
    assert part.verbatim is None
    if part.quantized is not None:
        assert torch.equal(part.quantized[1]().dequantized(), whole[start:stop])


def test_a_changed_source_has_neither_bytes_nor_codes(source: WeightSource) -> None:
    changed = source.changed(lambda rows: 1 + rows)
    assert torch.equal(changed.read(), 1 + source.read())
    assert torch.equal(changed.rows(3, 7).read(), 1 + source.read()[3:7])
    assert changed.verbatim is None
    assert changed.quantized is None


def test_rows_beyond_the_end_are_a_mistake(source: WeightSource) -> None:
    with pytest.raises(ValueError, match="rows 8 to 33 of 32"):
        source.rows(8, 33)


def test_codes_and_values_read_a_few_rows_at_a_time_are_those_read_at_once(
    source: WeightSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    for one in (source, source.half_split(4), source.rows(5, 31)):
        whole, values = one.quantized, one.read()
        codes = None if whole is None else whole[1]()
        with monkeypatch.context() as patch:
            patch.setattr(weight_source, "DECODED_AT_ONCE", 1)  # eight rows
            assert torch.equal(one.read(), values)
            if whole is None or codes is None:
                continue
            again = whole[1]()
        assert torch.equal(again.codes, codes.codes)
        assert torch.equal(again.scale, codes.scale)
