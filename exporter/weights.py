"""Weights, streamed tensor by tensor into one `weights.safetensors`. Knows no operator.

The file is an ordinary safetensors file under the checkpoint's canonical names, so any tool reads
it, and its byte ranges are at the same time the ONNX external data of `model.onnx` in the same
folder: a merged weight is the range that spans its neighbouring parts. No more than one tensor is
in memory.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx_ir as ir
import torch

from exporter.checkpoint import Checkpoint, check_finite
from graphs.errors import MistralcError
from graphs.spec import ModelSpec
from graphs.weights import WeightRef, weight_of

FILE_NAME = "weights.safetensors"

# safetensors' and torch's names of the element types a bundle may hold
ELEMENT: dict[ir.DataType, tuple[str, torch.dtype]] = {
    ir.DataType.FLOAT: ("F32", torch.float32),
    ir.DataType.FLOAT16: ("F16", torch.float16),
    ir.DataType.BFLOAT16: ("BF16", torch.bfloat16),
}
ALIGNMENT = 64  # bytes; of the first tensor, so that a mapped file suits any vector load

Progress = Callable[[int], None]  # called with the number of bytes just written


def weights_of(model: ir.Model) -> list[WeightRef]:
    """Return the weights that the graph reads, in the graph's order."""
    found = (weight_of(value) for value in model.graph.initializers.values())
    return [weight for weight in found if weight is not None]


def total_bytes(model: ir.Model) -> int:
    """Bytes that `write_weights` will write, the header apart."""
    return sum(weight.nbytes for weight in weights_of(model))


def write_weights(
    model: ir.Model, checkpoint: Checkpoint, directory: Path, progress: Progress | None = None
) -> None:
    """Write `weights.safetensors` and make the graph's weights point into it.

    Raises MistralcError naming the tensor when a weight is not finite, in the checkpoint or after
    conversion.
    """
    header = _header(weights_of(model), checkpoint.spec)
    offset = len(header)
    with (directory / FILE_NAME).open("wb") as file:
        file.write(header)
        for value in model.graph.initializers.values():
            weight = weight_of(value)
            if weight is None:
                continue
            for rows in _rows(weight, checkpoint):
                file.write(rows.flatten().view(torch.uint8).numpy().data)
                if progress is not None:
                    progress(rows.nbytes)
            value.const_value = ir.ExternalTensor(
                FILE_NAME, offset, weight.nbytes, weight.dtype,
                shape=weight.shape, name=str(weight.name), base_dir=directory,
            )  # fmt: skip
            offset += weight.nbytes


def _header(weights: list[WeightRef], spec: ModelSpec) -> bytes:
    """Build the safetensors header: every part of every weight, in the order they are written."""
    shapes, entries, offset = spec.weight_shapes(), {}, 0
    for weight in weights:
        element, dtype = ELEMENT[weight.dtype]
        for part in weight.parts:
            end = offset + math.prod(shapes[part]) * dtype.itemsize
            entries[part] = {
                "dtype": element,
                "shape": list(shapes[part]),
                "data_offsets": [offset, end],
            }
            offset = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _rows(weight: WeightRef, checkpoint: Checkpoint) -> Iterator[torch.Tensor]:
    """The parts of one weight, converted, one after another."""
    dtype = ELEMENT[weight.dtype][1]
    for part in weight.parts:
        stored = checkpoint.tensor(part)
        check_finite(part, stored)
        converted = stored.to(dtype).contiguous()
        if dtype is torch.float16 and not bool(torch.isfinite(converted).all()):
            raise MistralcError(
                f"The weight {part} has values up to {stored.abs().max().item():.3g}, beyond "
                "float16's 65504. Export with --precision bf16, which has float32's range."
            )
        yield converted
