"""The pass that writes quantized linears into the graph."""

from collections import Counter

import pytest

from graphs.passes.pipeline import lower
from graphs.passes.quantized_weights import Quantization
from graphs.passes.rule import PassError
from graphs.quant_scheme import default_scheme, groups
from tests.exporter.quantization.schemes import SCHEMES
from tests.exporter.quantization.tables import SPEC
from tests.support import tiny


def test_a_scheme_for_a_linear_that_is_not_in_the_graph_is_an_error() -> None:
    quantization = Quantization(schemes={"model.layers.9.mlp.up_proj.weight": SCHEMES[0]})
    with pytest.raises(PassError, match=r"no linear in the graph reads model\.layers\.9"):
        lower(tiny.traced(SPEC), tiny.build(SPEC), quantization)


def test_merged_linears_must_share_a_scheme() -> None:
    names = [name for group in groups(SPEC) for name in group.readers]
    schemes = dict.fromkeys(names, SCHEMES[0]) | {names[0]: SCHEMES[1]}
    with pytest.raises(PassError, match="differ in their schemes"):
        lower(tiny.traced(SPEC), tiny.build(SPEC), Quantization(schemes=schemes))


def test_an_input_shared_by_three_linears_is_rounded_once() -> None:
    names = [name for group in groups(SPEC) for name in group.readers]
    scheme = default_scheme("int8", block=None)
    quantization = Quantization(
        schemes=dict.fromkeys(names, scheme), input_scales=dict.fromkeys(names, 0.1)
    )
    model = tiny.traced(SPEC)
    lower(model, tiny.build(SPEC, "rtx"), quantization)
    found = Counter(node.op_type for node in model.graph)
    # One per input: q, k and v share one; o; gate; up, which reads a multiplied copy; down.
    assert found["QuantizeLinear"] == 5 * SPEC.num_hidden_layers
