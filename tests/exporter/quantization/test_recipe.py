"""Recipes and policies: smoothing, the blocks of a target, options that are refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from exporter.checkpoint.open import open_checkpoint
from exporter.decide import decide
from exporter.decoder.model import logits_at
from exporter.export import ExportOptions, export
from exporter.options import BuildOptions, QuantizeOptions
from exporter.quantization.carry import StoredCodes
from exporter.quantization.make_recipe import weight_facts
from exporter.quantization.policy import WeightFacts, output_scheme
from exporter.quantization.recipe import Recipe, smoothed
from exporter.quantization.reference import simulate
from graphs.errors import MistralcError, UsageError
from graphs.precisions import PRECISIONS
from graphs.quant_scheme import Offset, Scheme, default_scheme, groups
from graphs.targets import TARGETS
from tests.exporter.quantization.tables import SPEC
from tests.support import tiny
from tests.support.make_checkpoint import tiny_spec, write_checkpoint


def test_smoothing_without_quantization_changes_no_logit() -> None:
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    shapes = SPEC.weight_shapes()
    for group in groups(SPEC):
        columns = shapes[group.readers[0]][1]
        scales = torch.rand(columns, generator=generator) + 0.5
        if group.name.endswith(".o"):  # all query heads of a group read one value head
            heads = scales.view(SPEC.num_key_value_heads, -1, SPEC.head_dim)
            scales = heads[:, :1].expand_as(heads).flatten()
        tensors[f"{group.name}.smoothing"] = scales
    plain = Recipe(spec=SPEC, activation="float32")
    ids = torch.from_numpy(tiny.tokens(SPEC, 30))
    weights = tiny.weights(SPEC).__getitem__
    before = logits_at(simulate(plain, weights), ids, torch.arange(30))
    after = logits_at(simulate(replace(plain, tensors=tensors), weights), ids, torch.arange(30))
    # Two float32 roundings per weight, accumulated over the layers.
    assert (before - after).abs().max() < 1e-5 * before.abs().max()
    name = "model.layers.0.mlp.gate_proj.weight"
    assert not torch.equal(smoothed(name, weights(name), SPEC, tensors), weights(name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ExportOptions(precision="int8"), "mistralc calibrate"),
        (ExportOptions(precision="fp32", quantize=QuantizeOptions(block=32)), "--block"),
        (ExportOptions(precision="int4wo", quantize=QuantizeOptions(keep=("lm_head",)),
                       calibration=Path("nowhere")), "not a calibration table"),
    ],
    ids=["no table", "block", "no such table"],
)  # fmt: skip
def test_unfitting_options_are_refused_before_anything_is_written(
    options: ExportOptions, message: str, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(MistralcError, match=message):
        export(str(checkpoint), tmp_path / "bundle", options)
    assert list(tmp_path.iterdir()) == []


def test_an_engine_gets_the_largest_block_that_divides_a_weight(
    tmp_path: Path,
) -> None:
    spec = tiny_spec(hidden_size=192, intermediate_size=96, head_dim=48)
    path = write_checkpoint(tmp_path / "model", spec)
    rtx, options = TARGETS["rtx"], BuildOptions(precision="int4wo")
    build = decide(spec, rtx, options, weight_facts(open_checkpoint(path)))
    blocks = {name.split(".")[-2]: one.block for name, one in build.storage.schemes.items()}
    assert blocks["q_proj"] == 64, "128 does not divide 192"
    assert blocks["down_proj"] == 32, "64 does not divide 96"
    odd = tiny_spec(intermediate_size=80)
    path = write_checkpoint(tmp_path / "odd", odd)
    with pytest.raises(UsageError, match="has 80 columns, which blocks of 128 do not divide"):
        decide(odd, rtx, options, weight_facts(open_checkpoint(path)))
    with pytest.raises(UsageError, match=r"blocks of 32 do not divide.*ONNX Runtime CUDA.*fp16"):
        decide(odd, TARGETS["cuda"], options, weight_facts(open_checkpoint(path)))


def with_zero_points() -> WeightFacts:
    scheme = default_scheme("int4wo", block=32, offset="zero_point")
    return WeightFacts(calibrated={n: scheme for group in groups(SPEC) for n in group.readers})


@pytest.mark.parametrize("target", ["rtx", "tensorrt"])
def test_zero_points_of_a_table_are_refused_for_engines(target: str) -> None:
    options, facts = BuildOptions(precision="int4wo"), with_zero_points()
    with pytest.raises(UsageError, match=r"was calibrated with zero points.*without --zero-points"):
        decide(SPEC, TARGETS[target], options, facts)


def test_cuda_takes_zero_points_of_a_table_and_makes_none_itself() -> None:
    options, facts = BuildOptions(precision="int4wo"), with_zero_points()
    assert facts.calibrated is not None
    given = decide(SPEC, TARGETS["cuda"], options, facts).storage.schemes
    own = decide(SPEC, TARGETS["cuda"], options).storage.schemes
    assert given.items() >= facts.calibrated.items()
    assert {own[name].offset for name in facts.calibrated} == {"none"}


@pytest.mark.parametrize(
    ("target", "options", "copied"),
    [
        ("cpu", QuantizeOptions(), True), ("cpu", QuantizeOptions(symmetric=True), False),
        ("cpu", QuantizeOptions(block=64), None), ("cuda", QuantizeOptions(), True),
        ("rtx", QuantizeOptions(), False), ("rtx", QuantizeOptions(block=128), None),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("offset", ["none", "minimum"])
def test_a_gguf_files_blocks_are_kept_where_the_target_computes_them(
    target: str, options: QuantizeOptions, copied: bool | None, offset: Offset
) -> None:
    """`copied`: blocks with minimums are kept; None: none are, a block of another size is asked."""
    linears = [name for group in groups(SPEC) for name in group.readers]
    scheme = Scheme(codes="int4", block=32, offset=offset)
    codes = dict.fromkeys(linears, StoredCodes(label="Q4", scheme=scheme))
    chosen = BuildOptions(precision="int4wo", quantize=options)
    storage = decide(SPEC, TARGETS[target], chosen, WeightFacts(codes=codes)).storage
    kept = copied or (copied is False and offset == "none")
    assert set(storage.copied) == (set(linears) if kept else set())
    if kept:
        assert {storage.schemes[name] for name in linears} == {scheme}


def test_an_unsupported_block_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--block is 48; expected one of 32, 64, 128"):
        QuantizeOptions(block=48)


@pytest.mark.parametrize(
    ("target", "block", "message"),
    [("cpu", 48, "one of 32, 64, 128"), ("cpu", 128, "does not divide"), ("rtx", 64, "rtx")],
)
def test_an_unsupported_block_of_the_output_layer_is_refused(
    target: str, block: int, message: str
) -> None:
    spec = replace(SPEC, tie_word_embeddings=True)
    with pytest.raises(UsageError, match=f"--head-block.*{message}"):
        output_scheme(
            spec, TARGETS[target], PRECISIONS["int4wo"], QuantizeOptions(head_block=block)
        )
