"""From the PyTorch decoder to an ONNX graph, without a single weight in memory.

The decoder is built and traced on fake tensors, which have shapes and no bytes; every weight of
the resulting graph is a `WeightRef`, a name to be filled in by whoever writes the bundle. Knows
nothing about checkpoints, targets or files.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import onnx_ir as ir
import torch
from torch import export
from torch._subclasses.fake_tensor import FakeTensorMode

from exporter.decoder.model import Decoder, inverse_frequencies
from exporter.decoder.operators import TRANSLATIONS
from graphs.contract import Dim, TensorSpec, graph_inputs, graph_outputs
from graphs.dtypes import Dtype
from graphs.passes.weight_ref import ONNX_DTYPE, WeightRef
from graphs.spec import ModelSpec

OPSET = 24  # the first with TensorScatter and with Attention's bool mask as we use it

TORCH_DTYPE: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def trace(spec: ModelSpec, activation: Dtype) -> ir.Model:
    """Trace the decoder of `spec` with `activation` arithmetic into the portable graph.

    Inputs and outputs are those of `graph_inputs` and `graph_outputs`, in order, every letter a
    dynamic dimension. The graph is as PyTorch gives it: no optimization has run.
    """
    inputs, outputs = graph_inputs(spec, activation), graph_outputs(spec, activation)
    with FakeTensorMode(), _default_dtype(TORCH_DTYPE[activation]):
        decoder = Decoder(spec).eval()
        example = _example(inputs)
    exported = export.export(decoder, example, dynamic_shapes=_dynamic_shapes(inputs), strict=False)
    with _quiet():
        program = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            input_names=[i.name for i in inputs],
            output_names=[o.name for o in outputs],
            custom_translation_table=dict(TRANSLATIONS),
        )
    if program is None:
        raise TypeError("torch.onnx.export returned no program")
    model = program.model
    _name_weights(model, spec, activation)
    _name_dimensions(model, inputs)
    _declare(model.graph.inputs, inputs)
    _declare(model.graph.outputs, outputs)
    return model


def _example(
    inputs: tuple[TensorSpec, ...],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Fake inputs; each letter has a size of its own above 1, lest the tracer fix or equate it."""
    letters = dict.fromkeys(dim for i in inputs for dim in i.shape if isinstance(dim, str))
    sizes = {letter: 2 + i for i, letter in enumerate(letters)}
    tensors = [
        torch.zeros(
            [sizes[dim] if isinstance(dim, str) else dim for dim in i.shape],
            dtype=TORCH_DTYPE.get(i.dtype, torch.int64),
        )
        for i in inputs
    ]
    return tensors[0], tensors[1], tensors[2], tensors[3:]


def _dynamic_shapes(inputs: tuple[TensorSpec, ...]) -> tuple[object, ...]:
    """Which axis of which input is which letter, in the form that torch.export takes."""
    letters = {
        dim: export.Dim(dim, min=1) for i in inputs for dim in i.shape if isinstance(dim, str)
    }
    axes = [{n: letters[d] for n, d in enumerate(i.shape) if isinstance(d, str)} for i in inputs]
    return axes[0], axes[1], axes[2], axes[3:]


def _name_weights(model: ir.Model, spec: ModelSpec, activation: Dtype) -> None:
    """Put a name in place of every fake weight, and the real rotary frequencies in theirs."""
    shapes = spec.weight_shapes()
    dtype = ONNX_DTYPE[activation]
    for name, value in model.graph.initializers.items():
        if name == "inv_freq":
            value.const_value = ir.tensor(inverse_frequencies(spec).numpy(), name=name)
            continue
        part = "model.embed_tokens.weight" if name not in shapes else name
        value.const_value = WeightRef(name, (part,), shapes[part], dtype)
        value.shape, value.dtype = value.const_value.shape, dtype


def _name_dimensions(model: ir.Model, inputs: tuple[TensorSpec, ...]) -> None:
    """Call dimensions by the contract's letters inside the graph too, not s10 and s70."""
    letters: dict[str, Dim] = {}
    for value, row in zip(model.graph.inputs, inputs, strict=True):
        if value.shape is not None:
            letters |= {str(d): row.shape[n] for n, d in enumerate(value.shape)}
    for node in model.graph:
        for value in node.outputs:
            if value.shape is not None:
                value.shape = ir.Shape([letters.get(str(d), d) for d in value.shape])


def _declare(values: Sequence[ir.Value], table: tuple[TensorSpec, ...]) -> None:
    """Give the graph's inputs or outputs the names, shapes and dtypes of the contract."""
    for value, row in zip(values, table, strict=True):
        value.name = row.name
        value.shape = ir.Shape(row.shape)
        value.dtype = ONNX_DTYPE[row.dtype]


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make new parameters of this dtype; a fake module cannot be converted afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the tracer's remarks about packages we do not use off the user's terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
