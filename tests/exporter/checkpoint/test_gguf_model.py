"""Models in several GGUF files, and GGUF files that hold no model."""

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from exporter.checkpoint.gguf_model import describe_file, parts_of
from exporter.checkpoint.open import has_weights, open_checkpoint, read_spec
from exporter.decide import read_facts
from tests.exporter.checkpoint.edits import Q_PROJ, refusal, small_spec, write_gguf

SPEC = small_spec()


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """A model of 12 tensors in files of 5: three parts."""
    write_gguf(tmp_path / "model.gguf", SPEC, parts=5)
    return sorted(tmp_path.glob("*.gguf"))


def test_any_part_of_a_model_opens_the_whole(parts: list[Path], tmp_path: Path) -> None:
    assert [path.name for path in parts] == [f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    whole = open_checkpoint(write_gguf(tmp_path / "whole.gguf", SPEC))
    for path in parts:
        opened = open_checkpoint(path)
        assert opened.path == parts[0]
        assert opened.spec == whole.spec == read_spec(path)
        assert opened.fingerprint() == whole.fingerprint()
        for name in SPEC.weight_shapes():
            assert torch.equal(opened.tensor(name), whole.tensor(name))
        assert has_weights(path)
        assert read_facts(str(path))[0] == whole.spec
    assert len({source.path for source in opened.stored.values()}) == 3


def test_a_missing_part_is_named(parts: list[Path]) -> None:
    parts[1].unlink()
    message = refusal(parts[0])
    assert "one of 3 parts" in message
    assert parts[1].name in message


def test_the_first_part_is_needed_and_named(parts: list[Path]) -> None:
    parts[0].unlink()
    assert parts[0].name in refusal(parts[2])


def test_parts_of_other_names_are_refused(parts: list[Path], tmp_path: Path) -> None:
    moved = parts[0].rename(tmp_path / "renamed.gguf")
    assert "NAME-00001-of-00003.gguf" in refusal(moved)


def test_parts_of_different_models_are_refused(parts: list[Path], tmp_path: Path) -> None:
    shutil.copy(parts[1], parts[2])
    assert "part 1 of 3" in refusal(parts[0])
    other = tmp_path / "other"
    other.mkdir()
    write_gguf(other / "model.gguf", small_spec(num_hidden_layers=2), parts=9)
    third = sorted(other.glob("*.gguf"))[-1]
    assert third.name == parts[2].name
    shutil.copy(third, parts[2])
    assert "announces" in refusal(parts[0]) or "an earlier part has too" in refusal(parts[0])


def test_a_name_without_numbers_is_one_file(tmp_path: Path) -> None:
    assert parts_of(tmp_path / "model-of-3.gguf") == [tmp_path / "model-of-3.gguf"]


def write_other(path: Path, kind: str | None, architecture: str = "llama", **keys: str) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    if kind is not None:
        writer.add_type(kind)
    for key, value in keys.items():
        writer.add_string(key.replace("__", "."), value)
    writer.add_tensor("blk.0.attn_q.weight.in_sum2", np.zeros(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("kind", "architecture", "keys", "said"),
    [
        ("imatrix", "llama", {}, "an importance matrix"),
        (None, "llama", {"imatrix__datasets": "wiki"}, "an importance matrix"),
        ("adapter", "llama", {"adapter__type": "lora"}, r"an adapter \(LoRA\)"),
        (None, "llama", {"adapter__type": "lora"}, r"an adapter \(LoRA\)"),
        ("mmproj", "clip", {}, "vision or audio encoder"),
        (None, "clip", {}, "vision or audio encoder"),
    ],
)
def test_a_file_that_holds_no_model_is_refused_for_what_it_is(
    kind: str | None, architecture: str, keys: dict[str, str], said: str, tmp_path: Path
) -> None:
    path = write_other(tmp_path / "other.gguf", kind, architecture, **keys)
    message = refusal(path)
    assert said.replace("\\", "") in message
    assert "Give the model's own file" in message


def test_a_directory_of_gguf_files_lists_them_with_their_types(
    parts: list[Path], tmp_path: Path
) -> None:
    kinds = dict.fromkeys([Q_PROJ], gguf.GGMLQuantizationType.Q8_0)
    write_gguf(tmp_path / "small.gguf", SPEC, kinds)
    write_other(tmp_path / "imatrix.gguf", "imatrix")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "small.gguf").read_bytes()[:100])
    message = refusal(tmp_path)
    for listed in ("model-00001-of-00003.gguf (mostly F32)", "small.gguf (mostly F32)",
                   "imatrix.gguf (imatrix)", "cut.gguf (damaged)"):  # fmt: skip
        assert listed in message
    assert "00002" not in message


def test_the_type_of_a_file_is_that_of_most_of_its_bytes(tmp_path: Path) -> None:
    kinds = dict.fromkeys(SPEC.weight_shapes(), gguf.GGMLQuantizationType.F32)
    names = [name for name, shape in SPEC.weight_shapes().items() if len(shape) == 2]
    kinds |= dict.fromkeys(names, gguf.GGMLQuantizationType.Q8_0)
    assert describe_file(write_gguf(tmp_path / "q8.gguf", SPEC, kinds)) == "mostly Q8_0"
