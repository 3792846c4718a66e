"""Trace the PyTorch decoder into an ONNX graph, without any weights in memory.

The decoder is built and traced on fake tensors, which have shapes but no data. Every weight of the
graph is a `WeightRef`, a name whose data is added when the bundle is written. Knows nothing about
checkpoints, targets or files.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import onnx_ir as ir
import torch
from torch import export
from torch._subclasses.fake_tensor import FakeTensorMode

from exporter.decoder.model import Decoder
from exporter.decoder.operators import TRANSLATIONS
from exporter.decoder.rotary import inverse_frequencies
from graphs.contract import Dim, TensorSpec, graph_inputs, graph_outputs
from graphs.dtypes import ELEMENT_TYPES, Dtype
from graphs.passes.weight_ref import ONNX_DTYPE, WeightRef
from graphs.spec import EMBEDDING, ModelSpec

OPSET = 24  # the first with TensorScatter and with Attention's bool mask as we use it


def trace(spec: ModelSpec, activation: Dtype) -> ir.Model:
    """Trace the decoder of `spec` with `activation` arithmetic into the portable graph.

    Inputs and outputs are those of `graph_inputs` and `graph_outputs`, in order, with every letter
    a dynamic dimension. No optimization has run on the graph.
    """
    inputs, outputs = graph_inputs(spec, activation), graph_outputs(spec, activation)
    with FakeTensorMode(), _default_dtype(_torch_dtype(activation)):
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
    """Fake inputs; each letter has a distinct size above 1, or the tracer would fix or merge it."""
    letters = dict.fromkeys(dim for i in inputs for dim in i.shape if isinstance(dim, str))
    sizes = {letter: 2 + i for i, letter in enumerate(letters)}
    tensors = [
        torch.zeros(
            [sizes[dim] if isinstance(dim, str) else dim for dim in i.shape],
            dtype=_torch_dtype(i.dtype),
        )
        for i in inputs
    ]
    return tensors[0], tensors[1], tensors[2], tensors[3:]


def _dynamic_shapes(inputs: tuple[TensorSpec, ...]) -> tuple[object, ...]:
    """Map the axes of each input to their letters, in the form that torch.export takes."""
    letters = {
        dim: export.Dim(dim, min=1) for i in inputs for dim in i.shape if isinstance(dim, str)
    }
    axes = [{n: letters[d] for n, d in enumerate(i.shape) if isinstance(d, str)} for i in inputs]
    return axes[0], axes[1], axes[2], axes[3:]


def _name_weights(model: ir.Model, spec: ModelSpec, activation: Dtype) -> None:
    """Replace every fake weight by its name, and the fake rotary frequencies by their values."""
    shapes = spec.weight_shapes()
    dtype = ONNX_DTYPE[activation]
    for name, value in model.graph.initializers.items():
        if name == "inv_freq":
            value.const_value = ir.tensor(inverse_frequencies(spec).numpy(), name=name)
            continue
        part = EMBEDDING if name not in shapes else name
        value.const_value = WeightRef(name, (part,), shapes[part], dtype)
        value.shape, value.dtype = value.const_value.shape, dtype


def _name_dimensions(model: ir.Model, inputs: tuple[TensorSpec, ...]) -> None:
    """Name the dimensions inside the graph by the contract's letters, not s10 and s70."""
    letters: dict[str, Dim] = {}
    for value, row in zip(model.graph.inputs, inputs, strict=True):
        if value.shape is not None:
            letters |= {str(d): row.shape[n] for n, d in enumerate(value.shape)}
    for node in model.graph:
        for value in node.outputs:
            if value.shape is not None:
                value.shape = ir.Shape([letters.get(str(d), d) for d in value.shape])


def _declare(values: Sequence[ir.Value], table: tuple[TensorSpec, ...]) -> None:
    """Set names, shapes and dtypes of the graph's inputs or outputs to those of the contract."""
    for value, row in zip(values, table, strict=True):
        value.name = row.name
        value.shape = ir.Shape(row.shape)
        value.dtype = ONNX_DTYPE[row.dtype]


def _torch_dtype(dtype: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, ELEMENT_TYPES[dtype].torch or "")
    return found


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Create parameters in this dtype: a fake module cannot be converted afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the tracer's warnings about packages that we do not use."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
