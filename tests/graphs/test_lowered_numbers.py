"""The lowered graph of every target computes what the PyTorch decoder computes.

In float32 on ONNX Runtime CPU, for every form of attention that an engine or a bundle contains,
over four turns of the largest ring that wraps: in chunks, token by token, and mixed.
"""

from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple, get_args

import onnx_ir as ir
import pytest
import torch

from exporter.decide import decide
from exporter.decoder.model import Decoder
from exporter.options import BuildOptions, QuantizeOptions
from exporter.quantization.packing import pack
from exporter.quantization.recipe import Recipe
from exporter.quantization.reference import simulate
from graphs.build import Build
from graphs.passes.pipeline import lower
from graphs.quant_scheme import SCALE
from graphs.spec import ModelSpec, RingSpec
from graphs.targets import TARGETS, AttentionForm
from tests.support import tiny
from tests.support.lowered import check_numbers
from tests.support.make_checkpoint import tiny_spec

SPECS = {
    "two windows": tiny_spec(vocab_size=64, layer_windows=(4, 16)),  # others share its trace
    "one window": tiny_spec(vocab_size=64, window=8),
    "window and none": tiny_spec(vocab_size=64, layer_windows=(8, None)),
    "no window": tiny_spec(vocab_size=64),
    "a key head for each query head": tiny_spec(
        vocab_size=64, layer_windows=(8, None), num_key_value_heads=4
    ),
}
CHUNK = 3
LENGTHS = {"two windows": 4 * 18 + 5, "no window": 50}  # largest rings of 18 slots, else of 12
LENGTH = 4 * 12 + 5


class Variant(NamedTuple):
    """A target with some facts changed, and the form of layers without and with a window."""

    target: str
    full: AttentionForm
    windowed: AttentionForm
    changes: tuple[tuple[str, Any], ...] = ()


VARIANTS = {
    "cpu": Variant("cpu", "grouped", "masked"),
    "cuda": Variant("cuda", "grouped", "folded"),
    "cuda, unfused": Variant(
        "cuda", "grouped", "unfused", (("windowed_attention", "unfused"),)
    ),
    "cuda, masked": Variant("cuda", "masked", "masked",
                            (("full_attention", "masked"), ("windowed_attention", "masked"))),
    "rtx": Variant("rtx", "in_place", "in_place"),
    "tensorrt": Variant("tensorrt", "in_place", "in_place"),
    "rtx, large ring": Variant("rtx", "folded", "folded", (("max_in_place_slots", 0),)),
    "tensorrt, large ring": Variant("tensorrt", "folded", "folded", (("max_in_place_slots", 0),)),
}  # fmt: skip


def length(name: str) -> int:
    return LENGTHS.get(name, LENGTH)


def build_of(name: str, variant: Variant) -> Build:
    spec = SPECS[name]
    # Rows that begin ahead of others read 3 tokens more.
    ring = RingSpec(chunk=CHUNK, context=1 if spec.slides else length(name) + 3)
    target = replace(TARGETS[variant.target], **dict(variant.changes))
    return replace(tiny.build(spec, variant.target, ring=ring), target=target)


@cache
def lowered(name: str, variant: str) -> tuple[ir.Model, Build]:
    build = build_of(name, VARIANTS[variant])
    model = tiny.traced(build.spec)
    lower(model, build)
    return tiny.fill(model, build.spec), build


def turns(kind: str, count: int) -> list[int]:
    return {
        "chunks": [count],
        "single": [1] * count,
        "mixed": [5, 1, 1, count - 14, 1, 1, 2, 1, 1, 1],
    }[kind]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["chunks", "single", "mixed"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SPECS)
def test_the_lowered_graph_computes_what_the_pytorch_decoder_computes(
    name: str, variant: str, kind: str, batch: int
) -> None:
    model, build = lowered(name, variant)
    check_numbers(model, build, tiny.decoder(build.spec), batch, turns(kind, length(name)))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SPECS)
def test_the_graph_has_the_forms_that_it_is_compared_for(name: str, variant: str) -> None:
    model, build = lowered(name, variant)
    spec, expected = build.spec, VARIANTS[variant]
    single = spec.num_key_value_heads == spec.num_attention_heads
    forms = {
        window: "masked" if single and form == "folded" else form
        for window in spec.windows
        for form in (expected.full if window is None else expected.windowed,)
    }
    assert build.attention == forms
    layers = Counter(forms[window] for window in spec.layer_windows)
    found = Counter(node.op_type for node in model.graph)
    assert found["GroupQueryAttention"] == layers["grouped"]
    assert found["Attention"] == layers.total() - layers["grouped"]
    attentions = [node for node in model.graph if node.op_type == "Attention"]
    folded = sum(reads(node, 0, "Reshape") for node in attentions)
    appended = sum(reads(node, 1, "Concat") for node in attentions)
    assert (folded, appended) == (layers["folded"], layers["in_place"])
    on_onnxruntime = build.target.backend_module == "onnxruntime"
    assert found["FusedMatMul"] == (4 * len(spec.layer_windows) + 1) * on_onnxruntime
    skips = found["SkipSimplifiedLayerNormalization"]
    assert skips == (2 * len(spec.layer_windows) - 1) * on_onnxruntime


def reads(node: ir.Node, index: int, op_type: str) -> bool:
    value = node.inputs[index]
    producer = None if value is None else value.producer()
    return producer is not None and producer.op_type == op_type


def test_every_target_and_every_form_of_attention_is_compared() -> None:
    assert {variant.target for variant in VARIANTS.values()} == TARGETS.keys()
    compared = {
        form for name in SPECS for variant in VARIANTS.values()
        for form in build_of(name, variant).attention.values()
    }  # fmt: skip
    assert compared == set(get_args(AttentionForm))


def test_a_ring_that_does_not_grow_has_its_capacity_in_the_graph() -> None:
    for variant in VARIANTS:
        model, build = lowered("two windows", variant)
        cache = next(value for value in model.graph.inputs if value.name == "past_key.1")
        assert cache.shape is not None
        assert isinstance(cache.shape[2], int) is not build.target.ring_grows, variant
        sizes = [node for node in model.graph if node.op_type in ("Shape", "Squeeze", "Range")]
        assert bool(sizes) is build.target.ring_grows, f"{variant}: computed from the capacity"


# Quantized weights alone: MatMulNBits without rounded inputs on CUDA, DequantizeLinear in engines


@cache
def quantized(
    target: str, precision: str, *, tied: bool, block: int | None = None
) -> tuple[ir.Model, Build, Decoder]:
    """The graph of a GPU's target, in float32 instead of float16, and its reference."""
    spec = replace(SPECS["window and none"], tie_word_embeddings=tied)
    decided = decide(
        spec, replace(TARGETS[target], min_chunk=1),
        BuildOptions(
            precision=precision, chunk=CHUNK, context=LENGTH + 3,
            quantize=QuantizeOptions(block=block),
        ),
    )  # fmt: skip
    build = replace(decided, contract=replace(decided.contract, activation="float32"))
    recipe = Recipe(
        spec=spec, activation="float32", schemes=build.storage.schemes,
        layouts=build.storage.layouts, rounds_blocks=build.target.rounds_blocks,
    )  # fmt: skip
    model = tiny.traced(spec)
    lower(model, build)
    tiny.fill_from(model, stored(spec, recipe).__getitem__)
    return model, build, simulate(recipe, tiny.weights(spec).__getitem__)


def stored(spec: ModelSpec, recipe: Recipe) -> dict[str, torch.Tensor]:
    """The tensors of a bundle, by the names that the graph gives them."""
    found = dict(tiny.weights(spec))
    for name in recipe.schemes:
        codes, scale = pack(recipe.quantized(name, found[name]), recipe.stored, recipe.layout(name))
        found[name], found[name + SCALE] = codes, scale
    return found


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["chunks", "single", "mixed"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("precision", ["int8wo", "int4wo"])
def test_quantized_weights_on_cuda_compute_what_the_dequantized_ones_compute(
    precision: str, tied: bool, kind: str, batch: int
) -> None:
    model, build, reference = quantized("cuda", precision, tied=tied)
    check_numbers(model, build, reference, batch, turns(kind, LENGTH))


@pytest.mark.parametrize(("precision", "block"), [("int8wo", None), ("int8wo", 32), ("int4wo", 32)])
@pytest.mark.parametrize("target", ["rtx", "tensorrt"])
def test_quantized_weights_of_an_engine_compute_what_the_dequantized_ones_compute(
    target: str, precision: str, block: int | None
) -> None:
    model, build, reference = quantized(target, precision, tied=False, block=block)
    assert set(build.storage.layouts.values()) == {"transposed"}
    assert not [node for node in model.graph if node.op_type == "Transpose" and reads(
        node, 0, "DequantizeLinear")], "codes are stored as the product reads them"  # fmt: skip
    check_numbers(model, build, reference, 1, turns("mixed", LENGTH))


@pytest.mark.parametrize("precision", ["int8wo", "int4wo"])
def test_quantized_weights_are_symmetric_blocks_of_32_whose_inputs_are_not_rounded(
    precision: str,
) -> None:
    model, build, _ = quantized("cuda", precision, tied=True)
    schemes = build.storage.schemes.values()
    assert {(one.block, one.offset) for one in schemes} == {(32, "none")}
    assert not build.rounds_inputs
    products = [node for node in model.graph if node.op_type == "MatMulNBits"]
    assert len(products) == 4 * build.spec.num_hidden_layers + 1
    for node in products:
        assert len(node.inputs) == 3, "no zero points"
        assert "accuracy_level" not in node.attributes
    lookups = [node for node in model.graph if node.op_type == "GatherBlockQuantized"]
    assert len(lookups) == 1
