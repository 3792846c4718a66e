"""The audit of engines: right ones pass, and each kind of wrong one is refused in its own words."""

import importlib.util
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from exporter.engine import audit as auditing
from exporter.engine.audit import Audit
from exporter.engine.layers import EngineTensor, LayerInfo
from exporter.engine.request import Profile, profiles
from exporter.engine.traffic import Traffic, measure
from exporter.estimate.model import estimate
from graphs.errors import MistralcError
from graphs.passes.fold_query_groups import FoldQueryGroups
from graphs.passes.rule import Pass
from graphs.passes.trt.in_place import InPlace
from graphs.passes.trt.keep_gate_up_apart import KEEP_GATE_UP_APART
from graphs.spec import RingSpec
from tests.support import tiny
from tests.support.engines import BUILD, RING, SPEC, compile_graph, write_graph
from tests.support.make_checkpoint import tiny_spec

if importlib.util.find_spec("tensorrt_rtx") is None:
    pytest.skip("tensorrt_rtx is not installed: pip install 'mistralc[rtx]'",
                allow_module_level=True)  # fmt: skip

pytestmark = pytest.mark.usefixtures("kept_traces")

LAYERS, RINGS = SPEC.num_hidden_layers, 2 * SPEC.num_hidden_layers
RING_BYTES = BUILD.contract.ring_bytes
IN_PLACE, FOLDED = InPlace(windows=SPEC.windows), FoldQueryGroups(windows=SPEC.windows)
ONE, TWO = profiles(RING, apart=False), profiles(RING, apart=True)
ONE_ROW = tuple(tuple({**sizes, "B": 1} for sizes in profile) for profile in TWO)


def audited(directory: Path, **how: Any) -> Audit:
    """Build an engine and audit it as one whose rings should stay where they are."""
    ranges = how.pop("profiles", TWO)
    model = write_graph(directory, **how)
    return auditing.audit(
        compile_graph(directory, profiles=ranges), model.graph, BUILD, 2 * SPEC.num_parameters
    )


class Unfused:
    """A pass that computes attention from products and a softmax."""

    name = "unfused"

    def __call__(self, model: ir.Model, spec: object) -> int:
        """Rewrite every `Attention`, after its query heads were folded."""
        graph, count = model.graph, 0
        half = ir.DataType.FLOAT16
        for node in [node for node in graph if node.op_type == "Attention"]:
            query, key, value, mask = node.inputs
            scale, low = (
                ir.Value(name=f"{node.name}.{name}", shape=ir.Shape([]), type=ir.TensorType(half),
                         const_value=ir.tensor(number, half, f"{node.name}.{name}"))
                for name, number in (("scale", 0.125), ("low", -60000.0))
            )  # fmt: skip
            for constant in (scale, low):
                graph.register_initializer(constant)
            turned = ir.node("Transpose", [key], {"perm": [0, 1, 3, 2]})
            scores = ir.node("MatMul", [query, turned.outputs[0]])
            scaled = ir.node("Mul", [scores.outputs[0], scale])
            masked = ir.node("Where", [mask, scaled.outputs[0], low])
            shares = ir.node("Softmax", [masked.outputs[0]], {"axis": -1})
            product = ir.node("MatMul", [shares.outputs[0], value])
            graph.insert_before(node, [turned, scores, scaled, masked, shares, product])
            node.outputs[0].replace_all_uses_with(product.outputs[0])
            graph.remove(node, safe=True)
            count += 1
        return count


@pytest.mark.parametrize("precision", [None, "int8wo", "int4wo", "int8", "fp8"])
def test_a_right_engine_moves_nothing_of_the_size_of_a_ring_or_a_weight(
    precision: str | None, tmp_path: Path
) -> None:
    found = audited(tmp_path, precision=precision)
    assert found.faults == []
    assert (found.attention, found.attention_fused) == (LAYERS, LAYERS)
    assert (found.caches, found.caches_in_place, found.caches_copied) == (RINGS, RINGS, 0)
    smallest = min(RING_BYTES // RINGS, 128 * 512 // 2)  # a ring, and k_proj in 4 bits
    assert max(found.decode.movers.values(), default=0) < smallest
    # Weights once and the ring once, nothing else of size.
    assert RING_BYTES < found.decode.cache < 1.01 * RING_BYTES
    linears = sum(a * b for name, (a, *rest) in SPEC.weight_shapes().items() if rest
                  for b in rest if "proj" in name)  # fmt: skip
    bits = {None: 16, "int4wo": 4 + 16 / 128}.get(precision, 8)
    head = 2 * SPEC.vocab_size * SPEC.hidden_size
    assert found.decode.weights == pytest.approx(linears * bits / 8 + head, rel=0.01)
    assert found.prompt.moved < 2.2 * RING_BYTES * (1 + RING.chunk / 128) + 1e6, "one copy at most"


def test_the_estimate_of_a_step_is_what_the_audit_counts(tmp_path: Path) -> None:
    found, needed = audited(tmp_path), estimate(BUILD)
    assert needed.step_bytes == pytest.approx(found.decode.total, rel=0.01)
    assert needed.step_parts["weights"] == pytest.approx(found.decode.weights, rel=0.001)
    assert needed.step_parts["ring"] == pytest.approx(found.decode.cache, rel=0.001)


@pytest.mark.parametrize(
    ("passes", "ranges", "precision", "words"),
    [
        pytest.param(
            (), ONE_ROW, "int8wo", r"[\d,]+ bytes of weights are written out dequantized at every",
            id="one row and two profiles",
        ),
        pytest.param(
            (IN_PLACE, KEEP_GATE_UP_APART), ONE_ROW, "int8wo",
            "weights are written out dequantized at every token", id="one row, in place",
        ),
        pytest.param(
            (FOLDED, KEEP_GATE_UP_APART), ONE, None, "4 of 4 rings are copied at every token",
            id="folded",
        ),
        pytest.param(
            (IN_PLACE,), ONE, None, "4 of 4 rings are copied at every token", id="one profile",
        ),
        pytest.param((), ONE, None, "4 of 4 rings are repeated for the query heads", id="plain"),
        pytest.param(
            (), TWO, None, "4 of 4 rings are repeated for the query heads", id="plain prompts",
        ),
        pytest.param(
            (IN_PLACE, KEEP_GATE_UP_APART), ONE_ROW, None,
            "1,572,864 bytes of weights are stored in two layouts", id="qkv twice",
        ),
        pytest.param(
            (FOLDED, Unfused()), ONE, None, "only 0 of 2 attention layers are fused", id="unfused",
        ),
    ],
)  # fmt: skip
def test_a_wrong_engine_is_refused_in_its_own_words(
    passes: Iterable[Pass], ranges: tuple[Profile, ...], precision: str | None, words: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    found = audited(tmp_path, passes=passes, precision=precision, profiles=ranges)
    with pytest.raises(MistralcError, match=words):
        auditing.require(found, allow=False)
    auditing.require(found, allow=True)


@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads", "slots", "form"),
    [
        (128, 4, 1, 24_000, "in_place"), (256, 4, 2, 24_000, "in_place"),
        (80, 4, 4, 512, "in_place"), (128, 4, 2, 24_064, "folded"), (64, 4, 4, 24_064, "masked"),
    ],
)  # fmt: skip
def test_every_head_size_decodes_in_place_up_to_the_longest_ring(
    head_dim: int, heads: int, kv_heads: int, slots: int, form: str, tmp_path: Path
) -> None:
    spec = tiny_spec(
        vocab_size=512, num_hidden_layers=1, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, max_position_embeddings=32_768,
        layer_windows=(None,),
    )  # fmt: skip
    build = tiny.build(spec, "rtx", ring=RingSpec(chunk=64, context=slots), activation="float16")
    assert set(build.attention.values()) == {form}
    model = write_graph(tmp_path, build)
    plan = compile_graph(tmp_path, build)
    found = auditing.audit(plan, model.graph, build, 2 * spec.num_parameters)
    assert found.attention_fused == found.attention == 1
    assert found.caches_copied == (0 if form == "in_place" else 2)
    assert found.rings_stay == (form == "in_place")


STEP = Traffic(tokens=1, kernels=1, weights=100, cache=10, activations=1, moved=0, movers={})
SOUND = Audit(
    layers={"kgen": 1}, attention=2, attention_fused=2, caches=4, caches_in_place=4,
    caches_copied=0, caches_repeated=0, rings_stay=True, dequantized=0, stored_twice=0,
    interface="matches the contract", decode=STEP, prompt=STEP, plan_bytes=101_000_000,
    weight_bytes=100_000_000, plan_sha256="", tensorrt_version="1", warnings=(),
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attention_fused": 1}, "only 1 of 2 attention layers are fused"),
        ({"caches_in_place": 3}, "only 3 of 4 caches are in place"),
        ({"plan_bytes": 190_000_000}, "1.90 times the bytes"),
        ({"interface": "the input x does not match the contract"}, "the input x"),
    ],
)
def test_an_engine_with_a_fault_is_not_published_unless_allowed(
    change: dict[str, object], words: str
) -> None:
    auditing.require(SOUND, allow=False)
    faulty = replace(SOUND, **change)  # type: ignore[arg-type]
    with pytest.raises(MistralcError, match=words):
        auditing.require(faulty, allow=False)
    auditing.require(faulty, allow=True)


def test_a_ring_that_is_copied_is_no_fault_where_that_was_decided() -> None:
    copied = replace(SOUND, caches_copied=4)
    assert copied.faults == ["4 of 4 rings are copied at every token"]
    assert replace(copied, rings_stay=False).faults == []


LINE = (
    "Name: __myl_ReshTran_myl1_6, LayerType: kgen, Inputs: [ { Name: q [profile 1].1, Dimensions: "
    "[4,-1,16], Strides: [-1,16,1], StrideOrder: [2,1,0], Datatype: Half, Format: (Linear) Row "
    "major linear format }, { Name: present_key.0, Dimensions: [-1,2,128,64], Strides: "
    "[16384,8192,64,1], StrideOrder: [3,2,1,0], Datatype: Half, Format: (Arbitrary) Format with "
    "stride order = [1,2,0] }], Constants: [ { Name: weight, Dimensions: [64,32], Strides: [1,64], "
    "StrideOrder: [0,1], Datatype: Int4, Format: (Transposed) Transposed format }], Outputs: [ { "
    "Name: out, Dimensions: [1], Strides: [1], StrideOrder: [0], Datatype: Float, Format: x }], "
    "TacticName: , StreamId: 0, Metadata: [ONNX Layer: node_a [profile 1]][ONNX Layer: other]"
)


def tensor(name: str, shape: tuple[int, ...], strides: tuple[int, ...], dtype: str) -> EngineTensor:
    return EngineTensor(name=name, shape=shape, strides=strides, dtype=dtype)


def test_a_line_of_the_layer_list_is_read() -> None:
    layer = LayerInfo.parse(LINE)
    assert layer is not None
    assert layer == LayerInfo(
        name="__myl_ReshTran_myl1_6", kind="kgen", profile=1,
        inputs=(
            tensor("q.1", (4, -1, 16), (-1, 16, 1), "Half"),
            tensor("present_key.0", (-1, 2, 128, 64), (16384, 8192, 64, 1), "Half"),
        ),
        constants=(tensor("weight", (64, 32), (1, 64), "Int4"),),
        outputs=(tensor("out", (1,), (1,), "Float"),),
        nodes=frozenset({"node_a", "other"}),
    )  # fmt: skip
    assert layer.operations == ("Resh", "Tran")
    assert layer.family == "__myl_ReshTran"
    (weight,) = layer.constants
    assert weight.nbytes == 64 * 32 // 2
    assert weight.layout == ("Int4", (32, 64)), "as it lies in memory"
    assert LayerInfo.parse("Bindings:") is None


def test_open_axes_are_rows_tokens_or_slots_by_their_place() -> None:
    layer = LayerInfo.parse(LINE)
    assert layer is not None
    ring, slots = 2 * 128 * 64 * 2, 128
    found = measure([layer], BUILD.contract, 1)
    assert found.movers == {"__myl_ReshTran": 4 * 16 * 2 + ring + 64 * 32 // 2 + 4}
    assert (found.weights, found.cache, found.activations, found.total) == (0, 0, 0, found.moved)
    prompt = measure([layer], BUILD.contract, 10)
    assert prompt.moved - found.moved == 9 * 4 * 16 * 2
    keys = replace(layer, inputs=(tensor("keys", (-1, 2, -1, 64), (0, 0, 0, 0), "Half"),))
    assert measure([keys], BUILD.contract, 10).moved - 1028 == 2 * (slots + 9) * 64 * 2
