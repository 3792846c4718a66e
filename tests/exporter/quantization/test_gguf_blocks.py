"""Blocks of a GGUF file are stored as they are, without a second rounding."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors
import torch

from exporter.bundle import weights_file
from exporter.checkpoint.open import open_checkpoint
from exporter.checkpoint.quantized.gguf_blocks import block_source
from exporter.checkpoint.stored import ByteRange, StoredTensor
from exporter.decide import decide
from exporter.options import BuildOptions
from exporter.quantization.carry import describe_carried
from exporter.quantization.make_recipe import make_recipe, weight_facts
from exporter.quantization.packing import unpack
from graphs.quant_scheme import Scheme, groups, stored_parts
from graphs.targets import TARGETS
from tests.exporter.checkpoint.edits import write_gguf
from tests.support.gguf_blocks import KINDS, random_blocks
from tests.support.make_checkpoint import tiny_spec, to_half_split

SPEC = tiny_spec(num_hidden_layers=2, hidden_size=256, intermediate_size=256, head_dim=64)
LINEARS = [name for group in groups(SPEC) for name in group.readers]


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_a_type_give_the_numbers_that_the_gguf_package_gives(
    kind: str, tmp_path: Path
) -> None:
    rows, columns = 6, 512
    data = random_blocks(kind, rows, columns)
    (tmp_path / "blocks").write_bytes(data.tobytes())
    where = ByteRange(path=tmp_path / "blocks", offset=0, length=data.nbytes, dtype=kind)
    source = block_source(StoredTensor(name="w", shape=(rows, columns), where=where))
    expected = torch.from_numpy(
        gguf.dequantize(data, gguf.GGMLQuantizationType[kind]).reshape(rows, columns)
    )
    assert torch.equal(source.read(), expected)
    assert source.quantized is not None
    exact = source.quantized[1]()
    # scale * code + minimum and scale * (code - 8) + (minimum + 8 scale) round differently.
    assert (exact.dequantized() - expected).abs().max() <= 2e-7 * expected.abs().max()
    if source.scales == "float16":
        assert torch.equal(exact.scale.half().float(), exact.scale)
    part = source.rows(2, 5).quantized
    assert part is not None
    assert torch.equal(part[1]().codes, exact.codes[2:5])


def write_mixture(path: Path, kinds: dict[str, str], default: str) -> Path:
    """Write a model whose linears have random blocks of these types, by the end of their name."""
    blocks: dict[str, tuple[np.ndarray[Any, Any], str]] = {}
    for seed, name in enumerate(LINEARS):
        kind = next((one for end, one in kinds.items() if name.endswith(end)), default)
        rows, columns = SPEC.weight_shapes()[name]
        blocks[name] = random_blocks(kind, rows, columns, seed, size=0.002), kind
    return write_gguf(path, SPEC, blocks=blocks)


MIXTURES = {
    "Q4_K_M": ({"v_proj.weight": "Q6_K", "down_proj.weight": "Q6_K"}, "Q4_K"),
    "Q5_K_S": ({}, "Q5_K"),
    "Q3_K_M": ({"v_proj.weight": "Q5_K", "o_proj.weight": "Q4_K"}, "Q3_K"),
    "Q2_K": ({"v_proj.weight": "Q3_K"}, "Q2_K"),
    "IQ4_XS": ({"v_proj.weight": "Q5_K"}, "IQ4_XS"),
    "IQ4_NL": ({}, "IQ4_NL"),
    "Q6_K": ({}, "Q6_K"),
    "Q5_1": ({}, "Q5_1"),
    "Q8_0": ({}, "Q8_0"),
    "Q4_0": ({}, "Q4_0"),
}
NARROW = {"Q4_K_M", "Q3_K_M", "Q2_K", "Q4_0"}  # most of whose codes have at most 4 bits


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_of_types_is_carried_over_without_rounding(name: str, tmp_path: Path) -> None:
    opened = open_checkpoint(write_mixture(tmp_path / "model.gguf", *MIXTURES[name]))
    facts = weight_facts(opened)
    precision = "int4wo" if name in NARROW else "int8wo"
    build = decide(opened.spec, TARGETS["cpu"], BuildOptions(precision=precision), facts)
    assert set(build.storage.copied) >= set(LINEARS)
    recipe = make_recipe(build, opened, None)
    weights_file.stream_weights(opened, recipe, tmp_path)
    with safetensors.safe_open(tmp_path / weights_file.FILE_NAME, "pt") as file:
        for linear in LINEARS:
            scheme, layout = recipe.schemes[linear], recipe.layout(linear)
            shape = SPEC.weight_shapes()[linear]
            parts = stored_parts(linear, shape, scheme, recipe.activation, layout)
            got = unpack([file.get_tensor(part.name) for part in parts], shape, scheme, layout)
            exact = opened.stored[linear].quantized
            assert exact is not None
            assert torch.equal(got.codes, exact[1]().codes), linear
            expected = opened.tensor(linear)
            assert (got.dequantized() - expected).abs().max() <= 4e-7 * expected.abs().max()
    told = describe_carried(build, facts.codes)
    assert not any("dequantized" in line for line in told)


def test_linears_of_a_group_share_a_scheme_that_holds_all_their_codes(tmp_path: Path) -> None:
    opened = open_checkpoint(write_mixture(tmp_path / "model.gguf", *MIXTURES["Q4_K_M"]))
    facts = weight_facts(opened)
    build = decide(opened.spec, TARGETS["cpu"], BuildOptions(precision="int4wo"), facts)
    found = {name.split(".")[-2]: scheme for name, scheme in build.storage.schemes.items()}
    joined = Scheme(codes="int8", block=16, offset="minimum")
    assert {found[f"{letter}_proj"] for letter in "qkv"} == {joined}
    assert found["gate_proj"] == Scheme(codes="int4", block=32, offset="minimum")
    assert found["down_proj"] == Scheme(codes="int8", block=16)


def test_scales_that_a_target_rounds_and_codes_that_it_cannot_hold_are_told(
    tmp_path: Path,
) -> None:
    opened = open_checkpoint(write_mixture(tmp_path / "model.gguf", *MIXTURES["Q4_K_M"]))
    facts = weight_facts(opened)
    cuda = decide(opened.spec, TARGETS["cuda"], BuildOptions(precision="int4wo"), facts)
    assert describe_carried(cuda, facts.codes)[0] == (
        "10 weights of Q4_K: codes carried over bit for bit; scales rounded from float32 to float16"
    )
    rtx = decide(opened.spec, TARGETS["rtx"], BuildOptions(precision="int4wo"), facts)
    assert rtx.storage.copied == ()
    assert describe_carried(rtx, facts.codes)[0] == (
        "10 weights of Q4_K: dequantized exactly and rounded to int4: TensorRT-RTX has no form for "
        "these codes"
    )
    floats = decide(opened.spec, TARGETS["cpu"], BuildOptions(), facts)
    assert floats.precision.name == "fp32"


def test_types_that_look_values_up_in_a_grid_are_dequantized(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.IQ3_S
    _, width = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 256, (4, width), np.uint8)
    data[:, :2] = np.float16([0.01]).view(np.uint8)
    (tmp_path / "blocks").write_bytes(data.tobytes())
    where = ByteRange(path=tmp_path / "blocks", offset=0, length=data.nbytes, dtype="IQ3_S")
    source = block_source(StoredTensor(name="w", shape=(4, 256), where=where))
    assert source.quantized is None
    assert source.not_held == "its values are looked up in a grid"
    assert torch.equal(source.read(), torch.from_numpy(gguf.dequantize(data, kind)).view(4, 256))


def test_rows_of_a_rotated_weight_are_reordered_with_their_scales(tmp_path: Path) -> None:
    opened = open_checkpoint(write_mixture(tmp_path / "model.gguf", {}, "Q6_K"))
    name = "model.layers.0.self_attn.q_proj.weight"
    data = random_blocks("Q6_K", 256, 256, LINEARS.index(name), size=0.002)
    stored = torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType.Q6_K))
    expected = to_half_split(stored.view(256, 256), SPEC.num_attention_heads)
    exact = opened.stored[name].quantized
    assert exact is not None
    assert torch.equal(exact[1]().dequantized(), expected)
