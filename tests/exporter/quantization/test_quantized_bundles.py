"""Quantized bundles compute what their simulation computes, and pass the quality gate."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors
import torch

from exporter.checks.verify import bundle_reference
from exporter.decoder.model import logits_at
from exporter.export import ExportOptions, export
from exporter.options import QuantizeOptions
from exporter.quantization.recipe import Recipe
from exporter.quantization.reference import simulate
from graphs.manifest import Manifest, read_manifest
from graphs.quant_scheme import groups
from runtime.load import load_session, make_ring
from tests.conftest import Command
from tests.exporter.quantization.tables import SPEC, table_for, write_table
from tests.support import tiny
from tests.support.make_checkpoint import write_checkpoint

EXACT = (
    5e-6  # share of the largest logit: summation order; this model is too small for a code to flip
)


@pytest.mark.usefixtures("kept_traces")
@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("int8wo", QuantizeOptions()),
        ("int8wo", QuantizeOptions(block=64, keep=("lm_head",))),
        ("int4wo", QuantizeOptions()),
        ("int4wo", QuantizeOptions(block=64)),
        ("int4wo", QuantizeOptions(symmetric=True)),
        ("int4wo", QuantizeOptions(block=128)),  # 64 and 96 columns: every block is partial
    ],
    ids=str,
)
def test_a_weight_only_bundle_agrees_with_its_simulation(
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
def test_a_tied_embedding_is_stored_once(tmp_path: Path, bits: int, block: int | None) -> None:
    spec = replace(SPEC, tie_word_embeddings=True)
    path = write_checkpoint(tmp_path / "checkpoint", spec)
    bundle = tmp_path / "bundle"
    options = QuantizeOptions(head_bits=bits, head_block=block)
    manifest = export(str(path), bundle, ExportOptions(precision="int4wo", quantize=options))
    assert_exact(manifest)
    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    stored = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}["offset"]
        for tensor in graph.initializer
        if tensor.name in ("model.embed_tokens.weight.codes", "model.embed_tokens.weight.rows")
    }
    assert len(set(stored.values())) == 1, "both must read one range of the file, in two shapes"
    readers = {node.op_type for node in graph.node if stored.keys() & set(node.input)}
    assert readers == {"GatherBlockQuantized", "MatMulNBits"}
    unquantized = ExportOptions(precision="int4wo", quantize=QuantizeOptions(keep=("lm_head",)))
    larger = export(str(path), tmp_path / "kept", unquantized)
    assert_exact(larger)
    size = spec.vocab_size * spec.hidden_size
    saved = [m.files["weights.safetensors"].size for m in (larger, manifest)]
    # 4 bytes per weight become bits / 8, plus 4 bytes of scale per block; headers differ slightly.
    expected = size * (4 - bits / 8 - 4 / (block or 32))
    assert saved[0] - saved[1] == pytest.approx(expected, abs=500)


@pytest.mark.usefixtures("kept_traces")
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_bundle_with_rounded_activations_agrees_with_its_simulation(
    checkpoint: Path, tmp_path: Path, precision: str
) -> None:
    table = write_table(table_for(checkpoint, precision), tmp_path / "table")
    manifest = export(
        str(checkpoint), tmp_path / "bundle", ExportOptions(precision=precision, calibration=table)
    )
    assert_exact(manifest)
    nodes = onnx.load(tmp_path / "bundle" / "model.onnx").graph.node
    kinds = Counter(node.op_type for node in nodes)
    assert kinds["QuantizeLinear"] == 4 * SPEC.num_hidden_layers
    weights = {node.output[0] for node in nodes if node.op_type == "DequantizeLinear"}
    transposes = [
        node for node in nodes if node.op_type == "Transpose" and node.input[0] in weights
    ]
    assert len(transposes) == (0 if precision == "int8" else 4 * SPEC.num_hidden_layers)
    assert kinds["MatMulNBits"] == 1, "only the output layer, whose input is not rounded"
    assert manifest.quantization is not None
    assert manifest.quantization["method"] == "by hand"


@pytest.mark.usefixtures("kept_traces")
@pytest.mark.parametrize("precision", ["fp32", "int8wo", "int4wo", "int8", "fp8"])
def test_logits_of_a_row_are_bit_identical_for_any_two_or_more_rows(
    checkpoint: Path, tmp_path: Path, precision: str
) -> None:
    """The scheduler relies on this for answers that do not depend on other requests."""
    table = None
    if precision in ("int8", "fp8"):
        table = write_table(table_for(checkpoint, precision), tmp_path / "table")
    options = ExportOptions(precision=precision, calibration=table)
    manifest = export(str(checkpoint), bundle := tmp_path / "bundle", options)
    session = load_session(bundle, manifest.build, batch=7, threads=1)
    session.resize(make_ring(manifest.build).full)
    positions = np.array([[3], [9], [0], [5], [2], [7], [4]])  # each row's next position
    random = np.random.default_rng(0)
    full = {size: slice(0, manifest.ring.capacity(size)) for size in SPEC.windows}
    past = [random.standard_normal(cache.shape, np.float32) for cache in session.read_row(0, full)]
    found = []
    for row, first, count in ((0, 0, 2), (1, 0, 2), (3, 2, 3), (2, 0, 5), (6, 2, 5), (4, 0, 7)):
        for other in range(7):
            noise = [random.standard_normal(cache.shape, np.float32) for cache in past]
            session.write_row(other, full, past if other == row else noise)
        ids = random.integers(0, SPEC.vocab_size, (count, 1))
        ids[row - first] = 11
        where = positions[:count].copy()
        where[row - first] = 6
        logits = session.step(ids, where, np.zeros_like(ids), first)
        found.append(logits[row - first, 0].copy())
    assert all(np.array_equal(found[0], other) for other in found)


def assert_exact(manifest: Manifest) -> None:
    """Assert agreement in most cases: a value near a code boundary may round to the other code."""
    record = manifest.verification
    assert record is not None
    differences = sorted(case["max_rel"] for case in record["cases"])
    assert differences[len(differences) // 2] < EXACT, record["cases"]


@pytest.mark.usefixtures("kept_traces")
def test_a_bundle_can_be_its_own_reference(checkpoint: Path, tmp_path: Path) -> None:
    manifest = export(str(checkpoint), tmp_path / "bundle", ExportOptions(precision="int4wo"))
    own = bundle_reference(tmp_path / "bundle", manifest)
    ids = torch.from_numpy(tiny.tokens(SPEC, 20))
    recipe = Recipe(spec=SPEC, activation="float32")
    exact = logits_at(simulate(recipe, tiny.weights(SPEC).__getitem__), ids, torch.arange(20))
    got = logits_at(own, ids, torch.arange(20))
    assert not torch.equal(got, exact), "nothing was quantized"
    assert (got - exact).abs().max() < 0.5 * exact.abs().max()


@pytest.mark.usefixtures("kept_traces")
def test_verify_accepts_the_calibration_table_of_the_export(
    mistralc: Command, checkpoint: Path, tmp_path: Path
) -> None:
    table = write_table(table_for(checkpoint, "int8"), tmp_path / "table")
    bundle = tmp_path / "bundle"
    exported = mistralc(
        "export", checkpoint, "-o", bundle, "--precision", "int8", "--calibration", table
    )
    assert exported.code == 0, exported.err
    assert mistralc("verify", bundle).code == 0
    assert mistralc("verify", bundle, "--against", checkpoint, "--calibration", table).code == 0
    missing = mistralc("verify", bundle, "--against", checkpoint)
    assert missing.code == 1
    assert "made with the calibration table" in missing.err
    without_checkpoint = mistralc("verify", bundle, "--calibration", table)
    assert without_checkpoint.code == 2
    assert "--against" in without_checkpoint.err


@pytest.mark.usefixtures("kept_traces")
def test_a_bundle_with_too_much_loss_is_not_published(
    mistralc: Command, checkpoint: Path, tmp_path: Path
) -> None:
    options = ("--precision", "int4wo", "--symmetric")
    command = ("export", checkpoint, "-o", tmp_path / "bundle", *options)
    strict = mistralc(*command, "--max-ppl-increase", "0.00001")  # random weights lose 0.3%
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
