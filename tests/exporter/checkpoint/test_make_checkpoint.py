"""The checkpoints that the tests make are real ones: other libraries load them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from exporter.checkpoint.open import open_checkpoint
from tests.support.make_checkpoint import (
    tiny_spec,
    vocabulary,
    write_checkpoint,
)


def test_a_made_checkpoint_loads_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    spec = tiny_spec(window=8)
    path = write_checkpoint(tmp_path, spec, dtype="bf16", shard_size=100_000)
    model = transformers.MistralForCausalLM.from_pretrained(path, dtype=torch.float32)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, open_checkpoint(path).tensor(name).float()), name
    assert model.config.sliding_window == 8
    with torch.no_grad():
        logits = model(torch.arange(256)[None]).logits
    assert 0.5 < logits.std() < 2  # spread enough that greedy choices are not near ties


def test_a_made_tokenizer_reads_and_writes_any_text(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(write_checkpoint(tmp_path, tiny_spec()))
    ids = tokenizer("Ça va? 你好 👋")["input_ids"]
    assert ids[0] == 1
    assert max(ids) < 320
    assert tokenizer.decode(ids[1:]) == "Ça va? 你好 👋"
    assert len(set(vocabulary(49_152))) == 49_152


def test_the_script_writes_what_its_flags_say(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "support" / "make_checkpoint.py"
    flags = ("--preset", "tiny", "--dtype", "bf16", "--format", "mistral", "--shard-size", "50KB",
             "--seed", "3", "--layers", "3", "--window", "16")  # fmt: skip
    subprocess.run(
        [sys.executable, script, *flags, tmp_path / "out"],
        check=True, capture_output=True, cwd=tmp_path,
    )  # fmt: skip
    opened = open_checkpoint(tmp_path / "out")
    assert (opened.format, set(opened.dtypes.values())) == ("mistral", {"bfloat16"})
    assert opened.spec == tiny_spec(num_hidden_layers=3, window=16)
    assert (tmp_path / "out" / "consolidated.safetensors.index.json").is_file()
