"""Quantized weights in `weights.safetensors`: written some rows at a time, read back as a whole."""

from pathlib import Path

import pytest
import safetensors
import torch

from exporter.bundle import weights_file
from exporter.checkpoint.open import open_checkpoint
from exporter.decide import decide
from exporter.options import BuildOptions, QuantizeOptions
from exporter.quantization.make_recipe import make_recipe
from exporter.quantization.packing import unpack
from graphs.quant_scheme import stored_parts
from graphs.targets import TARGETS
from tests.support.make_checkpoint import tiny_spec, write_checkpoint


@pytest.mark.parametrize("rows", [2, 10, 1000])
@pytest.mark.parametrize(
    ("target", "precision", "block"),
    [("rtx", "int8wo", None), ("rtx", "int8wo", 32), ("rtx", "int4wo", 32), ("cuda", "int4wo", 32)],
)
def test_a_weight_written_some_rows_at_a_time_is_the_weight_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, precision: str,
    block: int | None, rows: int,
) -> None:  # fmt: skip
    spec = tiny_spec(window=8)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "checkpoint", spec))
    options = BuildOptions(precision=precision, quantize=QuantizeOptions(block=block))
    recipe = make_recipe(decide(checkpoint.spec, TARGETS[target], options), checkpoint, None)
    monkeypatch.setattr(weights_file, "QUANTIZED_BLOCK", rows * spec.hidden_size * 4)
    weights_file.stream_weights(checkpoint, recipe, tmp_path)
    assert recipe.schemes
    with safetensors.safe_open(tmp_path / weights_file.FILE_NAME, "pt") as file:
        for name, scheme in recipe.schemes.items():
            shape, layout = spec.weight_shapes()[name], recipe.layout(name)
            parts = stored_parts(name, shape, scheme, recipe.activation, layout)
            got = unpack([file.get_tensor(part.name) for part in parts], shape, scheme, layout)
            expected = recipe.quantized(name, checkpoint.tensor(name))
            assert torch.equal(got.codes, expected.codes), name
            assert torch.equal(got.scale, expected.scale), name


def test_codes_of_an_odd_number_of_rows_are_not_transposed() -> None:
    spec = tiny_spec(vocab_size=65)
    build = decide(
        spec,
        TARGETS["rtx"],
        BuildOptions(precision="int4wo", quantize=QuantizeOptions(head_bits=4)),
    )
    assert build.storage.schemes["lm_head.weight"].codes == "int4"
    others = build.storage.schemes.keys() - {"lm_head.weight"}
    assert build.storage.layouts == dict.fromkeys(others, "transposed")
