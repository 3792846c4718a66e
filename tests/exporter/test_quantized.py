"""Quantized bundles: codes, their layouts, the graph that reads them, and what is refused."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st

from exporter.checkpoint.open import open_checkpoint
from exporter.checks.verify import bundle_reference
from exporter.decoder.model import logits_at
from exporter.export import ExportOptions, export
from exporter.quantization.calibration_table import CalibrationTable
from exporter.quantization.gguf_blocks import read_blocks
from exporter.quantization.make_recipe import make_recipe
from exporter.quantization.packing import pack, pack_int4, unpack, unpack_int4
from exporter.quantization.policy import QuantizeOptions, output_scheme
from exporter.quantization.recipe import Recipe, smoothed
from exporter.quantization.reference import simulate
from exporter.quantization.rounding import blocked, quantize
from graphs.errors import MistralcError, UsageError
from graphs.manifest import Manifest, read_manifest
from graphs.passes.pipeline import lower
from graphs.passes.quantized_weights import Quantization
from graphs.passes.rule import PassError
from graphs.quant_scheme import Layout, Scheme, default_scheme, groups, stored_parts
from runtime.load import load_session, make_ring
from tests.conftest import Command
from tests.exporter.test_checkpoint import write_gguf
from tests.support import tiny
from tests.support.make_checkpoint import tiny_spec, write_checkpoint

SPEC = tiny_spec(window=13)  # its trace is shared with other tests
SCHEMES = (
    Scheme(codes="int8"),
    Scheme(codes="int8", block=32),
    Scheme(codes="int4", block=32),
    Scheme(codes="int4", block=64, offset="zero_point"),
    Scheme(codes="int4", block=32, offset="minimum"),
    Scheme(codes="float8e4m3"),
)
EXACT = 5e-6  # of the largest logit: summation order, on a model too small for a rounding flip


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("quantized") / "checkpoint", SPEC)


def table_for(path: Path, precision: str, **changed: object) -> CalibrationTable:
    """A table by hand: inputs of the layers lie within four or so."""
    scheme = default_scheme(precision, block=None)
    names = [name for group in groups(SPEC) for name in group.readers]
    table = CalibrationTable(
        precision=precision, method="by hand",
        checkpoint=open_checkpoint(path).fingerprint(), data={}, versions={},
        schemes=dict.fromkeys(names, scheme),
        tensors={f"{group.name}.input_scale": torch.tensor(0.03) for group in groups(SPEC)},
    )  # fmt: skip
    return replace(table, **changed)


def written(table: CalibrationTable, directory: Path) -> Path:
    directory.mkdir()
    table.write(directory)
    return directory


# Codes


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_quantized_weight_is_within_half_a_step_of_the_weight(scheme: Scheme) -> None:
    weight = matrix(12, 192)
    found = quantize(weight, scheme, torch.float32)
    # e4m3 has three bits after the leading one, so half a step is 1/16 of the number.
    half = found.scale.unsqueeze(-1) / 2
    if scheme.codes == "float8e4m3":
        half = torch.maximum(blocked(weight, scheme).abs() / 16, half)
    # A zero point that was rounded moves the ends of the range by half a step more.
    allowed = 2 * half if scheme.offset == "zero_point" else half
    error = (blocked(found.dequantized() - weight, scheme)).abs()
    assert (error <= allowed * 1.0001).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_a_code_stands_for_is_quantized_to_itself(scheme: Scheme) -> None:
    once = quantize(matrix(8, 128), scheme, torch.float32)
    again = quantize(once.dequantized(), scheme, torch.float32, once.scale, once.zero_point)
    if scheme.offset != "minimum":  # a minimum is found anew, and may round differently
        assert torch.equal(once.codes.float(), again.codes.float())


def test_a_last_block_that_is_not_full_has_a_scale_of_its_own() -> None:
    weight = matrix(4, 96)
    weight[:, 64:] *= 100
    found = quantize(weight, Scheme(codes="int4", block=64), torch.float32)
    assert found.scale.shape == (4, 2)
    assert (found.scale[:, 1] > 20 * found.scale[:, 0]).all()
    assert found.dequantized().shape == weight.shape


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**31))
def test_packed_codes_come_back(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (rows, columns), dtype=torch.int8, generator=generator)
    assert torch.equal(unpack_int4(pack_int4(codes))[:, :columns], codes)


@pytest.mark.parametrize("layout", ["onnx", "turned", "nbits"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_packed_weight_comes_back_and_has_the_shapes_that_were_announced(
    scheme: Scheme, layout: Layout
) -> None:
    if layout == "nbits" and (scheme.block is None or scheme.codes == "float8e4m3"):
        pytest.skip("MatMulNBits has whole blocks of integers only")
    if layout != "nbits" and scheme.offset == "zero_point":
        pytest.skip("zero points are only there for MatMulNBits")
    if layout == "turned" and (scheme.block is not None or scheme.codes == "int4"):
        pytest.skip("what is turned has one byte for each code and one scale for each row")
    weight = quantize(matrix(6, 96), scheme, torch.float32)
    parts = pack(weight, torch.float32, layout)
    announced = list(stored_parts("w", (6, 96), scheme, "float32", layout))
    shapes = [p.shape if p.element != "int4" else (6, 48) for p in announced]
    assert [tuple(part.shape) for part in parts] == shapes
    back = unpack(parts, (6, 96), scheme, layout)
    assert torch.equal(back.dequantized(), weight.dequantized())


# GGUF's blocks


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_gguf_blocks_are_taken_as_they_are(kind: str, tmp_path: Path) -> None:
    spec = tiny_spec(num_hidden_layers=1)
    linears = [name for group in groups(spec) for name in group.readers]
    kinds = dict.fromkeys(linears, gguf.GGMLQuantizationType[kind])
    opened = open_checkpoint(write_gguf(tmp_path / "model.gguf", spec, kinds))
    for group in groups(spec):
        for name in group.readers:
            assert opened.dtypes[name] == kind
            exact = read_blocks(opened, name)().dequantized()
            expected = opened.tensor(name)  # by the gguf package, in the same order of rows
            # d code + m and d (code - 8) + (m + 8 d) differ by float32's rounding of the sums.
            assert (exact - expected).abs().max() <= 4e-7 * expected.abs().max()


# The graph


def test_a_pass_that_does_not_find_its_linear_is_an_error() -> None:
    quantization = Quantization(schemes={"model.layers.9.mlp.up_proj.weight": SCHEMES[0]})
    with pytest.raises(PassError, match=r"no linear in the graph reads model\.layers\.9"):
        lower(tiny.traced(SPEC), SPEC, "cpu", quantization)


def test_linears_that_are_merged_must_share_a_scheme() -> None:
    names = [name for group in groups(SPEC) for name in group.readers]
    schemes = dict.fromkeys(names, SCHEMES[0]) | {names[0]: SCHEMES[1]}
    with pytest.raises(PassError, match="differ in their schemes"):
        lower(tiny.traced(SPEC), SPEC, "cpu", Quantization(schemes=schemes))


def test_an_input_that_three_linears_read_is_rounded_once() -> None:
    names = [name for group in groups(SPEC) for name in group.readers]
    scheme = default_scheme("int8", block=None)
    quantization = Quantization(
        schemes=dict.fromkeys(names, scheme), input_scales=dict.fromkeys(names, 0.1)
    )
    model = tiny.traced(SPEC)
    lower(model, SPEC, "rtx", quantization)
    found = Counter(node.op_type for node in model.graph)
    # One for each input: of q, k and v; of o; of gate; of up, which reads it times one; of down.
    assert found["QuantizeLinear"] == 5 * SPEC.num_hidden_layers


# Bundles


@pytest.mark.usefixtures("kept_traces")
@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("int8wo", QuantizeOptions()),
        ("int8wo", QuantizeOptions(block=64, keep=("lm_head",))),
        ("int4wo", QuantizeOptions()),
        ("int4wo", QuantizeOptions(block=64)),
        ("int4wo", QuantizeOptions(symmetric=True)),
        ("int4wo", QuantizeOptions(block=128)),  # 64 and 96 columns: no block is full
    ],
    ids=str,
)
def test_a_bundle_with_quantized_weights_computes_what_its_simulation_does(
    checkpoint: Path, tmp_path: Path, precision: str, options: QuantizeOptions
) -> None:
    manifest = export(
        str(checkpoint), tmp_path / "bundle", ExportOptions(precision=precision, quantize=options)
    )
    assert_exact(manifest)
    with safetensors.safe_open(tmp_path / "bundle" / "weights.safetensors", "pt") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    linears = {name for group in groups(SPEC) for name in group.readers}
    assert {kinds[name] for name in linears} == {"U8"}
    assert kinds["model.embed_tokens.weight"] == "F32"
    assert kinds["lm_head.weight"] == ("F32" if "lm_head" in options.keep else "U8")


@pytest.mark.usefixtures("kept_traces")
@pytest.mark.parametrize(("bits", "block"), [(8, None), (8, 64), (4, None), (4, 64)])
def test_a_tied_embedding_is_stored_once_and_read_by_both_its_users(
    tmp_path: Path, bits: int, block: int | None
) -> None:
    spec = replace(SPEC, tie_word_embeddings=True)
    path = write_checkpoint(tmp_path / "checkpoint", spec)
    bundle = tmp_path / "bundle"
    asked = QuantizeOptions(head_bits=bits, head_block=block)
    manifest = export(str(path), bundle, ExportOptions(precision="int4wo", quantize=asked))
    assert_exact(manifest)
    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    stored = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}["offset"]
        for tensor in graph.initializer
        if tensor.name in ("model.embed_tokens.weight.codes", "model.embed_tokens.weight.rows")
    }
    assert len(set(stored.values())) == 1, "one range of the file, in two shapes"
    readers = {node.op_type for node in graph.node if stored.keys() & set(node.input)}
    assert readers == {"GatherBlockQuantized", "MatMulNBits"}
    kept = ExportOptions(precision="int4wo", quantize=QuantizeOptions(keep=("lm_head",)))
    larger = export(str(path), tmp_path / "kept", kept)
    assert_exact(larger)
    size = spec.vocab_size * spec.hidden_size
    saved = [m.files["weights.safetensors"].size for m in (larger, manifest)]
    # Four bytes a weight become fewer, with a scale of four for a block; headers differ a little.
    expected = size * (4 - bits / 8 - 4 / (block or 32))
    assert saved[0] - saved[1] == pytest.approx(expected, abs=500)


@pytest.mark.parametrize(
    ("target", "block", "said"),
    [("cpu", 48, "one of 32, 64, 128"), ("cpu", 128, "does not divide"), ("rtx", 64, "rtx")],
)
def test_a_block_that_the_output_layer_cannot_have_is_refused(
    target: str, block: int, said: str
) -> None:
    spec = replace(SPEC, tie_word_embeddings=True)
    with pytest.raises(UsageError, match=f"--head-block.*{said}"):
        output_scheme(spec, target, "int4wo", QuantizeOptions(head_block=block))


@pytest.mark.usefixtures("kept_traces")
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_bundle_that_rounds_activations_computes_what_its_simulation_does(
    checkpoint: Path, tmp_path: Path, precision: str
) -> None:
    table = written(table_for(checkpoint, precision), tmp_path / "table")
    manifest = export(
        str(checkpoint), tmp_path / "bundle", ExportOptions(precision=precision, calibration=table)
    )
    assert_exact(manifest)
    nodes = onnx.load(tmp_path / "bundle" / "model.onnx").graph.node
    kinds = Counter(node.op_type for node in nodes)
    assert kinds["QuantizeLinear"] == 4 * SPEC.num_hidden_layers
    weights = {node.output[0] for node in nodes if node.op_type == "DequantizeLinear"}
    turned = [node for node in nodes if node.op_type == "Transpose" and node.input[0] in weights]
    assert len(turned) == (0 if precision == "int8" else 4 * SPEC.num_hidden_layers)
    assert kinds["MatMulNBits"] == 1, "the output layer, whose input is not rounded"
    assert manifest.quantization is not None
    assert manifest.quantization["method"] == "by hand"


@pytest.mark.usefixtures("kept_traces")
@pytest.mark.parametrize("precision", ["fp32", "int8wo", "int4wo", "int8", "fp8"])
def test_a_rows_logits_are_the_same_in_bits_among_two_rows_and_more(
    checkpoint: Path, tmp_path: Path, precision: str
) -> None:
    """What the scheduler relies on for answers that do not depend on who else is there."""
    table = None
    if precision in ("int8", "fp8"):
        table = written(table_for(checkpoint, precision), tmp_path / "table")
    options = ExportOptions(precision=precision, calibration=table)
    manifest = export(str(checkpoint), bundle := tmp_path / "bundle", options)
    session = load_session(bundle, manifest, batch=7, threads=1)
    session.resize(make_ring(manifest).full)
    positions = np.array([[3], [9], [0], [5], [2], [7], [4]])  # a token after the past of each
    dice = np.random.default_rng(0)
    full = {size: slice(0, manifest.ring.capacity(size)) for size in SPEC.windows}
    past = [dice.standard_normal(cache.shape, np.float32) for cache in session.read_row(0, full)]
    found = []
    for row, first, count in ((0, 0, 2), (1, 0, 2), (3, 2, 3), (2, 0, 5), (6, 2, 5), (4, 0, 7)):
        for other in range(7):
            noise = [dice.standard_normal(cache.shape, np.float32) for cache in past]
            session.write_row(other, full, past if other == row else noise)
        ids = dice.integers(0, SPEC.vocab_size, (count, 1))
        ids[row - first] = 11
        where = positions[:count].copy()
        where[row - first] = 6
        logits = session.step(ids, where, np.zeros_like(ids), first)
        found.append(logits[row - first, 0].copy())
    assert all(np.array_equal(found[0], other) for other in found)


def assert_exact(manifest: Manifest) -> None:
    """All but the rare case in which a number falls to the other side between two codes."""
    record = manifest.verification
    assert record is not None
    differences = sorted(case["max_rel"] for case in record["cases"])
    assert differences[len(differences) // 2] < EXACT, record["cases"]


@pytest.mark.usefixtures("kept_traces")
def test_a_bundle_is_its_own_reference(checkpoint: Path, tmp_path: Path) -> None:
    manifest = export(str(checkpoint), tmp_path / "bundle", ExportOptions(precision="int4wo"))
    own = bundle_reference(tmp_path / "bundle", manifest)
    ids = torch.from_numpy(tiny.tokens(SPEC, 20))
    recipe = Recipe(spec=SPEC, activation="float32")
    exact = logits_at(simulate(recipe, tiny.weights(SPEC).__getitem__), ids, torch.arange(20))
    got = logits_at(own, ids, torch.arange(20))
    assert not torch.equal(got, exact), "nothing was quantized"
    assert (got - exact).abs().max() < 0.5 * exact.abs().max()


@pytest.mark.usefixtures("kept_traces")
def test_verify_takes_the_table_that_a_bundle_was_made_with(
    mistralc: Command, checkpoint: Path, tmp_path: Path
) -> None:
    table = written(table_for(checkpoint, "int8"), tmp_path / "table")
    bundle = tmp_path / "bundle"
    made = mistralc(
        "export", checkpoint, "-o", bundle, "--precision", "int8", "--calibration", table
    )
    assert made.code == 0, made.err
    assert mistralc("verify", bundle).code == 0
    assert mistralc("verify", bundle, "--against", checkpoint, "--calibration", table).code == 0
    missing = mistralc("verify", bundle, "--against", checkpoint)
    assert missing.code == 1
    assert "made with the calibration table" in missing.err
    needless = mistralc("verify", bundle, "--calibration", table)
    assert needless.code == 2
    assert "--against" in needless.err


# The gate


@pytest.mark.usefixtures("kept_traces")
def test_a_bundle_that_loses_too_much_is_not_published(
    mistralc: Command, checkpoint: Path, tmp_path: Path
) -> None:
    options = ("--precision", "int4wo", "--symmetric")
    command = ("export", checkpoint, "-o", tmp_path / "bundle", *options)
    strict = mistralc(*command, "--max-ppl-increase", "0.00001")  # random weights lose 0.3 %
    assert strict.code == 1
    assert "is allowed, so it is not published" in strict.err
    assert list(tmp_path.iterdir()) == []
    text = tmp_path / "text.txt"
    text.write_text("A text of our own, about nothing at all. " * 60)
    relaxed = mistralc(*command, "--max-ppl-increase", "0.5", "--text", text)
    assert relaxed.code == 0, relaxed.err
    facts = read_manifest(tmp_path / "bundle").quantization
    assert facts is not None
    quality = facts["quality"]
    assert quality["text"].endswith("text.txt")
    assert quality["perplexity"] <= 1.5 * quality["reference_perplexity"]
    assert quality["kl"] > 0
    wrong = mistralc(*command, "--force", "--max-ppl-increase", "-1")
    assert wrong.code == 2


# Smoothing


def test_folding_a_smoothing_changes_nothing_in_float() -> None:
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    shapes = SPEC.weight_shapes()
    for group in groups(SPEC):
        columns = shapes[group.readers[0]][1]
        scales = torch.rand(columns, generator=generator) + 0.5
        if group.name.endswith(".o"):  # query heads of a group read one value head
            heads = scales.view(SPEC.num_key_value_heads, -1, SPEC.head_dim)
            scales = heads[:, :1].expand_as(heads).flatten()
        tensors[f"{group.name}.smoothing"] = scales
    plain = Recipe(spec=SPEC, activation="float32")
    ids = torch.from_numpy(tiny.tokens(SPEC, 30))
    weights = tiny.weights(SPEC).__getitem__
    before = logits_at(simulate(plain, weights), ids, torch.arange(30))
    after = logits_at(simulate(replace(plain, tensors=tensors), weights), ids, torch.arange(30))
    # Two roundings to float32 in a weight, and the layers that carry them on.
    assert (before - after).abs().max() < 1e-5 * before.abs().max()
    name = "model.layers.0.mlp.gate_proj.weight"
    assert not torch.equal(smoothed(name, weights(name), SPEC, tensors), weights(name))


# What is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (ExportOptions(precision="int8"), "mistralc calibrate"),
        (ExportOptions(precision="fp32", quantize=QuantizeOptions(block=32)), "--block"),
        (ExportOptions(precision="int4wo", quantize=QuantizeOptions(keep=("lm_head",)),
                       calibration=Path("nowhere")), "not a calibration table"),
    ],
    ids=["no table", "block", "no such table"],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused_before_anything_is_written(
    options: ExportOptions, words: str, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(MistralcError, match=words):
        export(str(checkpoint), tmp_path / "bundle", options)
    assert list(tmp_path.iterdir()) == []


def test_an_engine_takes_the_largest_block_that_divides_a_weight_or_refuses(
    tmp_path: Path,
) -> None:
    spec = tiny_spec(hidden_size=192, intermediate_size=96, head_dim=48)
    path = write_checkpoint(tmp_path / "model", spec)
    options = QuantizeOptions()
    recipe = make_recipe(open_checkpoint(path), spec, "rtx", "int4wo", "float16", options, None)
    blocks = {name.split(".")[-2]: scheme.block for name, scheme in recipe.schemes.items()}
    assert blocks["q_proj"] == 64, "128 does not divide 192"
    assert blocks["down_proj"] == 32, "nor 64 divide 96"
    odd = tiny_spec(intermediate_size=80)
    path = write_checkpoint(tmp_path / "odd", odd)
    with pytest.raises(UsageError, match="has 80 columns, which blocks of 128 do not divide"):
        make_recipe(open_checkpoint(path), odd, "rtx", "int4wo", "float16", options, None)


def test_a_block_that_is_no_block_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--block is 48; one of 32, 64, 128"):
        QuantizeOptions(block=48)


def test_a_table_of_another_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    table = written(table_for(checkpoint, "int8", checkpoint="f" * 64), tmp_path / "table")
    with pytest.raises(MistralcError, match=r"fingerprint ffffffffffff…, and"):
        export(str(checkpoint), tmp_path / "b", ExportOptions(precision="int8", calibration=table))


def test_a_table_of_another_precision_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    table = written(table_for(checkpoint, "fp8"), tmp_path / "table")
    with pytest.raises(UsageError, match="made for fp8 and --precision is int8"):
        export(str(checkpoint), tmp_path / "b", ExportOptions(precision="int8", calibration=table))


@pytest.mark.parametrize("name", ["calibration.json", "calibration.safetensors"])
def test_a_damaged_table_is_refused(checkpoint: Path, tmp_path: Path, name: str) -> None:
    table = written(table_for(checkpoint, "int8"), tmp_path / "table")
    assert CalibrationTable.read(table).fingerprint == table_for(checkpoint, "int8").fingerprint
    data = bytearray((table / name).read_bytes())
    data[len(data) // 2] ^= 1
    (table / name).write_bytes(data)
    with pytest.raises(MistralcError, match="is not a calibration table"):
        CalibrationTable.read(table)
