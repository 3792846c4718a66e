"""Finding a checkpoint where people keep one, and saying truly what is there instead."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.checkpoint.locate import format_of, locate
from exporter.checkpoint.open import open_checkpoint
from graphs.errors import MistralcError
from tests.support.make_checkpoint import tiny_spec, write_checkpoint

NAME = "mistralai/Mistral-7B-v0.1"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model in the hub's cache as huggingface_hub lays it out, links and all."""
    cache = tmp_path / "hub"
    root = cache / "models--mistralai--Mistral-7B-v0.1"
    blobs = write_checkpoint(root / "blobs", tiny_spec(window=8))
    snapshot = root / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / file.name)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0123abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    return root


def test_a_model_in_the_hubs_cache_is_found_by_its_name_and_by_its_root(hub: Path) -> None:
    expected = open_checkpoint(hub / "blobs").fingerprint()
    for source in (NAME, str(hub), str(hub / "snapshots" / "0123abc")):
        assert open_checkpoint(source).fingerprint() == expected
    assert locate(NAME).label == locate(hub).label == NAME


def test_several_snapshots_without_main_are_not_chosen_from(hub: Path) -> None:
    shutil.copytree(hub / "snapshots" / "0123abc", hub / "snapshots" / "4567def")
    assert locate(NAME).path.name == "0123abc"
    (hub / "refs" / "main").unlink()
    with pytest.raises(MistralcError, match=r"2 snapshots.*0123abc, .*4567def"):
        locate(NAME)


def test_an_adapters_base_is_found_in_the_cache(hub: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    values = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": NAME}
    (adapter / "adapter_config.json").write_text(json.dumps(values))
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file({f"{module}.lora_A.weight": torch.ones(1, 64),
               f"{module}.lora_B.weight": torch.ones(64, 1)},
              adapter / "adapter_model.safetensors")  # fmt: skip
    base = open_checkpoint(NAME).tensor("model.layers.0.self_attn.q_proj.weight")
    merged = open_checkpoint(adapter).tensor("model.layers.0.self_attn.q_proj.weight")
    assert torch.equal(merged, base + 1)


def test_a_name_that_is_not_in_the_cache_is_told_how_to_get_it(hub: Path) -> None:
    with pytest.raises(MistralcError, match=r"no model mistralai/Other .*hf download"):
        locate("mistralai/Other")
    with pytest.raises(MistralcError, match=r"There is no checkpoint at .*Check the path"):
        locate("./mistralai/Other/deeper")


def test_directories_that_hold_something_else_say_what(tmp_path: Path) -> None:
    inner = write_checkpoint(tmp_path / "outer" / "model", tiny_spec())
    with pytest.raises(MistralcError, match=f"Give the directory inside it: {inner}"):
        open_checkpoint(tmp_path / "outer")
    native = write_checkpoint(tmp_path / "native", tiny_spec(), format="mistral")
    (native / "params.json").unlink()
    with pytest.raises(MistralcError, match=r"Mistral's own form: download their params\.json"):
        open_checkpoint(native)
    (inner / "config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    with pytest.raises(MistralcError, match=r"configuration of an adapter .*--lora"):
        open_checkpoint(inner)


def test_a_complete_native_pair_is_taken_beside_incomplete_shards(tmp_path: Path) -> None:
    both = write_checkpoint(tmp_path / "both", tiny_spec(window=8), shard_size=50_000)
    native = write_checkpoint(tmp_path / "native", tiny_spec(window=8), format="mistral")
    for name in ("params.json", "consolidated.safetensors"):
        shutil.copy(native / name, both)
    assert format_of(both) == "huggingface"
    next(iter(sorted(both.glob("model-*.safetensors")))).unlink()
    assert format_of(both) == "mistral"
    assert open_checkpoint(both).fingerprint() == open_checkpoint(native).fingerprint()
    (both / "consolidated.safetensors").unlink()
    assert format_of(both) == "huggingface"


@pytest.mark.parametrize(
    "prefix", ["base_model.model.", "_orig_mod.", "module.", "module._orig_mod."]
)
def test_prefixes_that_all_weights_share_are_stripped(prefix: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", tiny_spec(window=8))
    expected = open_checkpoint(path).fingerprint()
    tensors = load_file(path / "model.safetensors")
    save_file({prefix + name: one for name, one in tensors.items()}, path / "model.safetensors")
    assert open_checkpoint(path).fingerprint() == expected
    first, *others = tensors
    partly = {first: tensors[first], **{prefix + name: tensors[name] for name in others}}
    save_file(partly, path / "model.safetensors")
    with pytest.raises(MistralcError, match="lacks the tensor"):
        open_checkpoint(path)
