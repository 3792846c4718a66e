"""The portable graph compiles with TensorRT-RTX without plugins, rewriting or a GPU.

This holds the graph contract, not the engine code: every operator and attribute is one that
TensorRT takes, the ring is updated in place, and weights are stored once.
"""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphs.contract import graph_inputs
from graphs.dtypes import Dtype, item_size
from graphs.spec import ModelSpec, RingSpec
from tests.support import tiny
from tests.support.make_checkpoint import tiny_spec

os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"  # polygraphy reads it when it is imported

if importlib.util.find_spec("tensorrt_rtx") is None:
    pytest.skip("tensorrt_rtx is not installed: pip install 'mistralc[rtx]'",
                allow_module_level=True)  # fmt: skip

from polygraphy.backend.trt import (
    CreateConfig,
    EngineBytesFromNetwork,
    NetworkFromOnnxPath,
    Profile,
)

CHUNK = 8
SPEC = tiny_spec(
    vocab_size=4096, hidden_size=512, intermediate_size=1024, num_attention_heads=8, head_dim=64,
    window=13, tie_word_embeddings=True,
)  # fmt: skip  # 7 million weights, so that storing them twice shows in the plan's size
CAPACITY = RingSpec(chunk=CHUNK, context=1).capacity(13)


def write_graph(directory: Path, spec: ModelSpec, activation: Dtype) -> Path:
    """Write the portable graph with the ring's capacity fixed, as TensorRT requires."""
    model = tiny.fill(tiny.lowered(spec, "portable", activation), spec)
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.shape is not None
        value.shape = ir.Shape([CAPACITY if d == "C" else d for d in value.shape])
    ir.save(model, directory / "model.onnx")
    return directory / "model.onnx"


def profile(spec: ModelSpec, activation: Dtype) -> Profile:
    """One row, one token up to a chunk, logits of one token."""
    least, most = {"B": 1, "S": 1, "T": 1}, {"B": 1, "S": CHUNK, "T": 1}
    found = Profile()
    for row in graph_inputs(spec, activation):

        def sized(letters: Mapping[str, int], shape: tuple[Any, ...] = row.shape) -> list[int]:
            return [(letters | {"C": CAPACITY}).get(dim, dim) for dim in shape]

        found.add(row.name, sized(least), sized(least), sized(most))
    return found


def compile_plan(graph: Path, spec: ModelSpec, activation: Dtype) -> bytes:
    config = CreateConfig(profiles=[profile(spec, activation)])
    return bytes(EngineBytesFromNetwork(NetworkFromOnnxPath(str(graph)), config=config)())


@pytest.mark.parametrize("activation", ["float16", "bfloat16"])
def test_a_sliding_window_model_compiles_and_its_plan_holds_the_weights_once(
    activation: Dtype, tmp_path: Path
):
    plan = compile_plan(write_graph(tmp_path, SPEC, activation), SPEC, activation)
    weights = SPEC.num_parameters * item_size(activation)
    # A plan also has kernels and tables: 1.9 MB here.
    # The tied embedding (4.2 MB) stored twice, or the linears (9 MB), would not fit below.
    assert weights < len(plan) < weights + 3_000_000


def test_an_attribute_that_tensorrt_lacks_is_refused(tmp_path: Path):
    """Shows that compiling the graphs above did not ignore attributes."""
    from polygraphy.exception import PolygraphyException

    path = write_graph(tmp_path, SPEC, "float16")
    model = ir.load(path)
    attention = next(node for node in model.graph if node.op_type == "Attention")
    attention.attributes["softmax_precision"] = ir.AttrInt64("softmax_precision", 1)
    ir.save(model, path)
    with pytest.raises(PolygraphyException, match="parse"):
        compile_plan(path, SPEC, "float16")


def test_half_precision_graphs_hold_half_precision_weights(tmp_path: Path):
    model = ir.load(write_graph(tmp_path, SPEC, "bfloat16"))
    stored = {v.dtype for v in model.graph.initializers.values() if np.prod(v.shape) > CHUNK * 100}
    assert stored == {ir.DataType.BFLOAT16}
