"""GGUF checkpoints: read as the gguf package reads them, and refused if damaged or unsupported."""

from pathlib import Path

import gguf
import numpy as np
import torch

from exporter.checkpoint.gguf_file import read_gguf
from exporter.checkpoint.open import Checkpoint, open_checkpoint
from tests.exporter.checkpoint.edits import (
    Q_PROJ,
    drawn,
    refusal,
    small_spec,
    write_gguf,
)
from tests.support.make_checkpoint import (
    write_checkpoint,
)

# What is read


def test_our_gguf_header_reader_agrees_with_the_gguf_package(smollm2: Checkpoint) -> None:
    ours, theirs = read_gguf(smollm2.path), gguf.GGUFReader(smollm2.path)
    fields = {name: field for name, field in theirs.fields.items() if "GGUF." not in name}
    assert ours.metadata.keys() == fields.keys()
    for name, value in ours.metadata.items():
        assert value == fields[name].contents(), name
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert found.shape == tuple(reversed(tensor.shape.tolist()))
        assert (found.where.offset, found.where.length) == (tensor.data_offset, tensor.n_bytes)


def test_quantized_gguf_rows_are_dequantized_and_unpermuted(tmp_path: Path) -> None:
    spec = small_spec()
    kind = gguf.GGMLQuantizationType.Q8_0
    path = write_gguf(tmp_path / "q8.gguf", spec, {Q_PROJ: kind})
    opened = open_checkpoint(path)
    blocks = gguf.quants.quantize(drawn(spec, Q_PROJ).numpy(), kind)  # blocks are within a row
    assert opened.dtypes[Q_PROJ] == "Q8_0"
    assert torch.equal(opened.tensor(Q_PROJ), torch.from_numpy(gguf.dequantize(blocks, kind)))


def test_quantized_tensors_have_no_verbatim_bytes(smollm2: Checkpoint) -> None:
    assert smollm2.bytes_of("model.layers.0.mlp.up_proj.weight") is None
    assert smollm2.bytes_of("model.norm.weight") is not None


# What is refused


def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\3\4" + b"\0" * 100)
    assert "does not begin with the letters GGUF" in refusal(path)
    path.write_bytes(b"GGUF")
    assert "has only 4 bytes" in refusal(path)


def test_other_gguf_versions_and_byte_orders_are_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, small_spec(), format="gguf")
    data = bytearray(path.read_bytes())
    data[4:8] = (1).to_bytes(4, "little")
    path.write_bytes(data)
    assert "version 1" in refusal(path)
    data[4:8] = (3).to_bytes(4, "big")
    path.write_bytes(data)
    assert "big-endian" in refusal(path)


def test_another_gguf_architecture_is_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "the architecture is gemma3" in refusal(tmp_path / "other.gguf")


def test_a_truncated_gguf_is_refused_with_the_tensor(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, small_spec(), format="gguf")
    path.write_bytes(path.read_bytes()[:-100])
    assert "is truncated" in refusal(path)
    assert "output.weight" in refusal(path)


def test_gguf_tensors_are_matched_strictly(tmp_path: Path) -> None:
    spec, path = small_spec(), tmp_path / "model.gguf"
    write_gguf(path, spec, extra={"blk.0.attn_q.bias": np.ones(32, np.float32)})
    assert "lacks the tensor blk.0.attn_k.bias and 1 more" in refusal(path)
    write_gguf(path, spec, extra={"blk.0.attn_norm.bias": np.ones(32, np.float32)})
    assert "blk.0.attn_norm.bias" in refusal(path)
    write_gguf(path, spec, extra={"rope_freqs.weight": np.full(5, 2, np.float32)})
    assert "5 factors for 8 rotated features" in refusal(path)
    write_gguf(path, spec, extra={"rope_freqs.weight": np.ones((4, 1), np.float32)})
    assert "rope_freqs.weight has shape [4, 1]" in refusal(path)
    write_gguf(path, spec, block_count=2)
    assert "blk.1.attn_norm.weight" in refusal(path)
    write_gguf(path, spec, feed_forward_length=64)
    assert "blk.0.ffn_gate.weight has shape [32, 32]; expected [64, 32]" in refusal(path)


def test_an_unreadable_gguf_type_is_refused_by_name(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", small_spec())
    data = path.read_bytes()
    name = b"blk.0.attn_v.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8  # past the name, the count and two dimensions
    for number, shown in ((26, "I32"), (9, "Q8_1"), (200, "200")):
        path.write_bytes(data[:at] + number.to_bytes(4, "little") + data[at + 4 :])
        message = refusal(path)
        assert name.decode() in message
        assert shown in message
