"""The `inspect` command."""

import json
from dataclasses import replace
from pathlib import Path

from runtime.bundle.describe import describe
from runtime.bundle.open import open_bundle
from tests.conftest import CONTEXT, Command
from tests.support.commands import json_output, succeeded


def test_inspect_describes_the_bundle(mistralc: Command, sliding_bundle: Path) -> None:
    out = succeeded(mistralc("inspect", sliding_bundle))
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    for fact in ("tiny (huggingface)", "102,720", "16 slots, chunk 8"):
        assert fact in out
    assert "longest text  unlimited" in out
    assert "passed against the checkpoint" in out
    assert rows["target"] == "cpu (ONNX Runtime CPU)"
    assert rows["precision"] == "fp32 (float32), computes in float32"
    assert rows["window"] == "8 tokens in every layer (from the checkpoint)"
    assert "quantized" not in rows


def test_inspect_reports_the_manifest_and_derived_facts(
    mistralc: Command, plain_bundle: Path
) -> None:
    facts = json_output(mistralc("inspect", plain_bundle, "--json"))
    manifest = json.loads((plain_bundle / "manifest.json").read_text(encoding="utf-8"))
    del manifest["manifest_sha256"]
    assert facts["manifest"].items() >= manifest.items()
    assert facts["parameters"] == 102_720
    assert facts["capacities"] == {"None": CONTEXT}
    assert facts["endless"] is False
    # 2 layers x (key, value) x 2 heads x 16 x 4 bytes, for every slot.
    assert facts["ring_bytes"] == 2 * 2 * 2 * 16 * 4 * CONTEXT


def test_inspect_describes_how_weights_are_quantized(
    mistralc: Command, rounded_bundle: Path
) -> None:
    out = succeeded(mistralc("inspect", rounded_bundle))
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert rows["precision"] == "int8wo (8-bit weights), computes in float32"
    # 2 layers of 7 linears, and the output layer, which shares its weight with no other.
    assert rows["quantized"] == "15 of 21 weights: int8, one scale per block of 32"
    assert rows["window"] == "none: every layer sees the whole text (from the checkpoint)"
    assert f"longest text  {CONTEXT} tokens" in out


def test_a_description_counts_each_scheme_and_window(sliding_bundle: Path) -> None:
    bundle = open_bundle(sliding_bundle)
    names = [name for name in bundle.manifest.model.weight_shapes() if "_proj" in name]
    int4 = {"codes": "int4", "block": 64, "offset": "zero_point", "activation": None}
    int8 = {"codes": "int8", "block": None, "offset": "none", "activation": "int8"}
    schemes = dict.fromkeys(names, int4) | {names[0]: int8}
    model = replace(bundle.manifest.model, layer_windows=(8, None))
    manifest = replace(
        bundle.manifest, precision="int4wo", model=model, window_source="user",
        quantization={"schemes": schemes, "repacked": names[1:3]},
        ring=replace(bundle.manifest.ring, max_batch=4),
    )  # fmt: skip
    lines = describe(replace(bundle, manifest=manifest)).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("quantized"))
    assert [line[14:] for line in lines[at : at + 3]] == [
        "13 of 21 weights: int4, one scale per block of 64, with zero points",
        "1 of 21 weights: int8, one scale per row; inputs are rounded to int8",
        "2 of these keep the checkpoint's own codes",
    ]
    rows = dict(line.split(maxsplit=1) for line in lines)
    assert rows["window"] == "8 tokens in 1 of 2 layers, none in 1 of 2 layers (chosen at export)"
    assert rows["batch"] == "up to 4 sequences"
