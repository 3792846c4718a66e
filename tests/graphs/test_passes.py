"""Graph passes: each fires as often as expected, and logits do not change."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxscript import optimizer

from graphs.passes.dead_code import DEAD_CODE
from graphs.passes.fold_constants import FOLD_CONSTANTS
from graphs.passes.fold_query_groups import FoldQueryGroups
from graphs.passes.merge_linears import MERGE_GATE_UP, MERGE_QKV
from graphs.passes.pipeline import PASSES, PORTABLE, lower, passes_of
from graphs.passes.rule import Pass, PassError
from graphs.passes.tie_embedding import TIE_EMBEDDING
from graphs.passes.trt.in_place import InPlace
from graphs.passes.weight_ref import WeightRef, weight_of
from graphs.spec import ModelSpec, RingSpec
from runtime.decoding.ring import Ring
from tests.support import tiny
from tests.support.make_checkpoint import tiny_spec

SPEC = tiny_spec(vocab_size=64, layer_windows=(4, 16))  # shares its trace with other tests
TIED = replace(SPEC, tie_word_embeddings=True)
LAYERS = SPEC.num_hidden_layers
CPU = passes_of(tiny.build(SPEC))
ROOT = Path(__file__).resolve().parents[2]


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def weights(model: ir.Model) -> dict[str, WeightRef]:
    found = {name: weight_of(value) for name, value in model.graph.initializers.items()}
    return {name: weight for name, weight in found.items() if weight is not None}


def node_reading(model: ir.Model, name: str) -> ir.Node:
    """The one node that reads the weight `name`."""
    (node,) = model.graph.initializers[name].consumers()
    return node


def logits_of(model: ir.Model, spec: ModelSpec) -> tiny.Logits:
    """Logits of 40 tokens in chunks and single steps; fills `model` with weights."""
    data = ir.to_proto(tiny.fill(model, spec)).SerializeToString()
    ring = Ring(spec, RingSpec(chunk=3, context=1 if spec.slides else 40))
    return tiny.in_turns(tiny.load(data, spec), ring, tiny.tokens(spec, 40), [17, 1, 1, 1, 20])


# All passes


@pytest.mark.parametrize(
    ("spec", "expected"),
    [(SPEC, {"tie_embedding": 0}), (TIED, {"tie_embedding": 1})],
    ids=["untied", "tied"],
)
def test_every_pass_fires_as_often_as_expected(spec: ModelSpec, expected: dict[str, int]):
    fired = lower(tiny.traced(spec), tiny.build(spec))
    counts = {
        "merge_qkv": LAYERS, "merge_gate_up": LAYERS, "skip_norm": 2 * LAYERS - 1,
        "fuse_transpose": 4 * LAYERS + 1, "fold_attention_scale": LAYERS, **expected,
    }  # fmt: skip
    assert {name: fired[name] for name in counts} == counts
    assert fired["fold_constants"] > 0
    assert fired["dead_code"] > 0
    assert fired.keys() == {step.name for step in CPU}
    assert "group_query_attention" not in fired, "both layers have a window"


def test_every_target_begins_with_the_portable_passes():
    for target, steps in PASSES.items():
        assert steps[: len(PORTABLE)] == PORTABLE, target


@pytest.mark.parametrize("spec", [SPEC, TIED], ids=["untied", "tied"])
def test_no_pass_changes_the_logits_of_the_trace(spec: ModelSpec):
    expected = logits_of(tiny.traced(spec), spec)
    assert float(np.abs(expected).max()) > 1, (
        "the comparison needs logits that are not close to zero"
    )
    model = tiny.traced(spec)
    for step in CPU:
        step(model, spec)
        got = logits_of(model.clone(), spec)
        # A merged product may sum its 64 terms in another order, which changes logits of 4 by at
        # most about 1e-6 (here not at all). A swapped row gives entirely different logits.
        assert np.abs(got - expected).max() <= 2e-5, f"after {step.name}"


# Single passes


def test_a_tied_embedding_becomes_one_initializer_for_lookup_and_head():
    model = tiny.traced(TIED)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= weights(model).keys()
    TIE_EMBEDDING(model, TIED)
    assert "lm_head.weight" not in model.graph.initializers
    readers = model.graph.initializers["model.embed_tokens.weight"].consumers()
    assert sorted(node.op_type for node in readers) == ["Gather", "Transpose"]


@pytest.mark.parametrize("windows", [(None, None), (None, 16)], ids=["full", "interleaved"])
@pytest.mark.parametrize("heads", [(4, 2), (2, 2), (6, 1)], ids=["grouped", "single", "shared"])
def test_layers_without_a_window_use_one_attention_operator(
    windows: tuple[int | None, ...], heads: tuple[int, int]
):
    spec = replace(
        SPEC, layer_windows=windows, num_attention_heads=heads[0], num_key_value_heads=heads[1]
    )
    expected = logits_of(tiny.traced(spec), spec)
    model = tiny.traced(spec)
    fired = lower(model, tiny.build(spec, ring=RingSpec(chunk=1, context=40)))
    full = windows.count(None)
    assert fired["group_query_attention"] == operators(model)["GroupQueryAttention"] == full
    assert operators(model)["Attention"] == operators(model)["TensorScatter"] / 2 == LAYERS - full
    assert fired["fold_attention_scale"] == LAYERS - full
    assert model.graph.initializers["rotary_cos"].shape == (40, spec.head_dim // 2)
    # Another summation order and another softmax kernel; logits are about 4.
    assert np.abs(logits_of(model, spec) - expected).max() <= 2e-5


def test_unsupported_head_sizes_keep_the_standard_attention():
    spec = replace(SPEC, layer_windows=(None, None), head_dim=24)
    model = tiny.traced(spec)
    assert "group_query_attention" not in lower(model, tiny.build(spec))
    assert operators(model)["Attention"] == LAYERS


def test_positions_beyond_the_rotary_table_are_an_error():
    spec = replace(SPEC, layer_windows=(None, None))
    model = tiny.traced(spec)
    lower(model, tiny.build(spec, ring=RingSpec(chunk=1, context=20)))
    with pytest.raises(Exception, match=r"cos_cache|rotary|position"):
        logits_of(model, spec)


def test_an_untied_head_is_not_changed():
    model = tiny.traced(SPEC)
    assert TIE_EMBEDDING(model, SPEC) == 0
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= weights(model).keys()


@pytest.mark.parametrize(
    ("step", "merged", "parts"),
    [
        (MERGE_QKV, "self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj",
                                           "self_attn.v_proj")),
        (MERGE_GATE_UP, "mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
    ],
    ids=["qkv", "gate_up"],
)  # fmt: skip
def test_sibling_linears_become_one_product_and_a_split(
    step: Pass, merged: str, parts: tuple[str, ...]
):
    model = tiny.lowered(SPEC, "portable")
    before = operators(model)
    step(model, SPEC)
    change = {op: operators(model)[op] - before[op] for op in ("MatMul", "Split")}
    assert change == {"MatMul": LAYERS * (1 - len(parts)), "Split": LAYERS}
    shapes = SPEC.weight_shapes()
    for i in range(LAYERS):
        names = tuple(f"model.layers.{i}.{part}.weight" for part in parts)
        weight = weights(model)[f"model.layers.{i}.{merged}.weight"]
        assert weight.parts == names
        assert weight.sizes == (sum(shapes[name][0] for name in names), SPEC.hidden_size)


@pytest.mark.parametrize("heads", [(4, 2), (8, 1)], ids=["groups of 2", "one key head"])
def test_folding_query_groups_changes_no_logit(heads: tuple[int, int]):
    spec = replace(SPEC, num_attention_heads=heads[0], num_key_value_heads=heads[1])
    expected = logits_of(tiny.lowered(spec, "portable"), spec)
    model = tiny.lowered(spec, "portable")
    assert FoldQueryGroups(windows=spec.windows)(model, spec) == LAYERS
    stacked = [node for node in model.graph if node.op_type == "Concat"]
    assert len(stacked) == len(spec.windows), "one stacked mask per window, not per layer"
    difference = np.abs(logits_of(model, spec) - expected).max()
    # Another kernel sums the same products: logits of up to 4 differed by 1e-6.
    assert difference < 1e-5


def test_query_heads_with_their_own_key_heads_cannot_be_folded():
    spec = replace(SPEC, num_key_value_heads=SPEC.num_attention_heads)
    model = tiny.lowered(spec, "portable")
    with pytest.raises(PassError, match="4 query heads and 4 key heads"):
        FoldQueryGroups(windows=spec.windows)(model, spec)


def test_what_is_appended_behind_the_ring_changes_no_bit():
    model = tiny.traced(SPEC)
    expected, before = logits_of(model.clone(), SPEC), operators(model)["Concat"]
    assert InPlace(windows=SPEC.windows)(model, SPEC) == LAYERS
    added = operators(model)["Concat"] - before
    assert added == 2 * LAYERS + len(SPEC.windows), "one mask per window, not per layer"
    assert np.array_equal(logits_of(model, SPEC), expected)


@pytest.mark.parametrize("step", [FoldQueryGroups, InPlace])
def test_a_layer_without_attention_over_its_ring_stops_the_export(
    step: type[FoldQueryGroups | InPlace],
):
    model = tiny.traced(SPEC)
    node = next(node for node in model.graph if node.op_type == "Attention")
    node.op_type = "Other"
    with pytest.raises(PassError, match="layer 0 has no Attention over its ring"):
        step(windows=SPEC.windows)(model, SPEC)


@pytest.mark.parametrize(
    ("target", "changed", "slots", "forms"),
    [
        ("cpu", {}, 100, {"window": "masked", "full": "grouped"}),
        ("cpu", {"head_dim": 24}, 100, {"window": "masked", "full": "masked"}),
        ("cuda", {}, 100, {"window": "folded", "full": "grouped"}),
        ("cuda", {"head_dim": 24}, 100, {"window": "folded", "full": "folded"}),
        ("cuda", {"num_key_value_heads": 4}, 100, {"window": "masked", "full": "grouped"}),
        ("rtx", {}, 24_000, {"window": "in_place", "full": "in_place"}),
        ("rtx", {}, 24_001, {"window": "folded", "full": "folded"}),
        ("rtx", {"num_key_value_heads": 4}, 24_001, {"window": "masked", "full": "masked"}),
    ],
)
def test_the_form_of_attention_follows_from_the_target_and_the_ring(
    target: str, changed: dict[str, int], slots: int, forms: dict[str, str]
):
    spec = replace(SPEC, layer_windows=(4, None), **changed)  # type: ignore[arg-type]
    build = tiny.build(spec, target, ring=RingSpec(chunk=1, context=slots))
    assert max(build.contract.capacities.values()) == slots
    assert build.attention == {4: forms["window"], None: forms["full"]}
    assert build.decodes_apart == ("in_place" in forms.values())


def test_after_all_passes_every_checkpoint_tensor_is_in_the_graph_exactly_once():
    for spec in (SPEC, TIED):
        for target in PASSES:
            found = weights(tiny.lowered(spec, target)).values()
            parts = Counter(part for weight in found for part in weight.parts)
            assert parts == Counter(spec.weight_shapes().keys()), f"{target}: {parts}"


def test_dead_code_removes_only_unused_outputs_of_attention():
    model = tiny.traced(SPEC)
    outputs = [value.name for value in model.graph.outputs]
    DEAD_CODE(model, SPEC)
    assert [value.name for value in model.graph.outputs] == outputs
    attentions = [node for node in model.graph if node.op_type == "Attention"]
    assert len(attentions) == LAYERS
    for node in attentions:
        assert len([value for value in node.outputs if value.name]) == 1
    assert DEAD_CODE(model, SPEC) == 0, "the second run must find nothing"


# Constants and weights


def test_constant_folding_does_not_touch_weights_or_their_readers():
    model = tiny.traced(SPEC)

    def readers() -> set[tuple[str, str]]:
        return {(name, node_reading(model, name).op_type) for name in weights(model)}

    before = readers()
    assert FOLD_CONSTANTS(model, SPEC) > 0
    assert readers() == before
    assert ("model.layers.0.self_attn.q_proj.weight", "Transpose") in before


def test_constant_folding_would_fold_weights_with_values():
    """The weights in the test above are therefore skipped, not too large."""
    model = tiny.fill(tiny.traced(SPEC), SPEC)
    transposes = operators(model)["Transpose"]
    optimizer.fold_constants(
        model, onnx_shape_inference=False, input_size_limit=65_536, output_size_limit=65_536
    )
    assert operators(model)["Transpose"] < transposes


def test_a_weight_reference_has_no_values():
    weight = weights(tiny.traced(SPEC))["model.layers.1.mlp.down_proj.weight"]
    assert tuple(weight.shape) == (64, 96)
    with pytest.raises(TypeError, match=r"model\.layers\.1\.mlp\.down_proj\.weight.*names and sha"):
        weight.numpy()
    with pytest.raises(TypeError, match="asked for its numbers"):
        weight.tobytes()


# A pass that does not fire gives the reason


def wrong_type(model: ir.Model) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    old = weights(model)[name]
    model.graph.initializers[name].const_value = WeightRef(
        name, old.parts, old.sizes, ir.DataType.FLOAT16
    )


def wrong_size(model: ir.Model) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    old = weights(model)[name]
    model.graph.initializers[name].const_value = WeightRef(name, old.parts, (96, 63), old.dtype)


def other_operator(model: ir.Model) -> None:
    matmul = node_reading(model, "model.layers.0.self_attn.v_proj.weight").outputs[0].consumers()[0]
    matmul.op_type = "Gemm"


def other_head(model: ir.Model) -> None:
    head = weights(model)["lm_head.weight"]
    model.graph.initializers["lm_head.weight"].const_value = WeightRef(
        "lm_head.weight", ("lm_head.weight",), head.sizes, head.dtype
    )


def wider_head(model: ir.Model) -> None:
    head = weights(model)["lm_head.weight"]
    value = model.graph.initializers["lm_head.weight"]
    value.const_value = WeightRef("lm_head.weight", head.parts, (65, 64), head.dtype)
    value.shape = ir.Shape([65, 64])


@pytest.mark.parametrize(
    ("step", "damage", "message"),
    [
        (MERGE_QKV, wrong_type, r"merge_qkv fired 1 times; expected 2: .*layers\.1.*dtypes differ"),
        (MERGE_GATE_UP, wrong_size, r"merge_gate_up fired 1 .*input sizes differ, \[64, 63\]"),
        (MERGE_QKV, other_operator, "merge_qkv fired 1 times; expected 2: its pattern matched no"),
        (TIE_EMBEDDING, other_head, "tie_embedding fired 0 times; expected 1: its pattern matched"),
        (TIE_EMBEDDING, wider_head, r"tie_embedding fired 0 .*lm_head.* is \[65,64\]"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_pass_that_does_not_fire_stops_the_export_with_the_reason(
    step: Pass, damage: Callable[[ir.Model], None], message: str
):
    model = tiny.traced(TIED)
    damage(model)
    with pytest.raises(PassError, match=message):
        step(model, TIED)


# The written file


@pytest.mark.parametrize("spec", [SPEC, TIED], ids=["untied", "tied"])
def test_the_portable_graph_is_valid_onnx_of_standard_operators_only(spec: ModelSpec):
    model = ir.to_proto(tiny.fill(tiny.lowered(spec, "portable"), spec))
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 24)]
    assert not model.functions, "a function would be a custom operator"


@pytest.mark.parametrize("target", PASSES)
def test_the_file_has_no_trace_of_the_build_machine(target: str):
    forbidden = (b".py", b"site-packages", b"Traceback", b"stack_trace", str(ROOT).encode())
    model = ir.to_proto(tiny.fill(tiny.lowered(SPEC, target), SPEC))
    for initializer in model.graph.initializer:
        initializer.ClearField("raw_data")  # random bytes may contain any word
    data = model.SerializeToString()
    assert [word for word in forbidden if word in data] == []
    described = (model, model.graph, *model.graph.node)
    assert not any(part.metadata_props or part.doc_string for part in described)


def test_the_trace_itself_names_source_files():
    """Their absence above is therefore due to the passes."""
    model = ir.to_proto(tiny.fill(tiny.traced(SPEC), SPEC))
    assert b".py" in model.SerializeToString()
