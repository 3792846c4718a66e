"""Weights, streamed block by block into one `weights.safetensors`. Knows no operator.

The file is an ordinary safetensors file under the checkpoint's canonical names, so any tool reads
it; and its byte ranges are at the same time the ONNX external data of `model.onnx` in the same
folder. All weights come first, in their canonical order, then the scales of the quantized ones,
then what else those have: so a merged weight (q, k and v, say) is the range that spans its
neighbours, scales included, and the file does not depend on the graph.

Bytes that need no conversion are moved by the kernel, which shares them with the checkpoint where
the file system can. The rest is converted a block at a time.
"""

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, Self

import onnx_ir as ir
import torch

from exporter.checkpoint.open import Checkpoint, check_finite
from exporter.checkpoint.stored import TORCH_FLOATS, ByteRange
from exporter.quantization.packing import pack
from exporter.quantization.recipe import Recipe
from exporter.quantization.rounding import Quantized
from graphs.errors import MistralcError
from graphs.passes.weight_ref import weight_of
from graphs.quant_scheme import MINIMUM, SCALE, ZERO_POINT, StoredPart, stored_parts

FILE_NAME = "weights.safetensors"

ELEMENT: Mapping[str, str] = {  # safetensors' name of an element type; int4 are two to a byte
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8", "int8": "I8",
    "float8e4m3": "F8_E4M3", "int4": "U8",
}  # fmt: skip
ALIGNMENT = 64  # bytes; of the first tensor, so that a mapped file suits any vector load
BLOCK = 1 << 25  # bytes converted or moved at once: 32 MiB
QUANTIZED = 1 << 22  # bytes in float32 that are quantized at once, with half a dozen copies
LARGEST_FLOAT16 = torch.finfo(torch.float16).max

Progress = Callable[[int], None]  # called with the number of bytes just written


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The file before it is written: its header, and where in the file each tensor lies.

    `parts` are the tensors that a quantized weight is stored as, by the weight's name.
    """

    header: bytes
    ranges: Mapping[str, tuple[int, int]]  # begin and end, from the start of the file
    parts: Mapping[str, tuple[StoredPart, ...]]

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """Lay out all weights of the recipe's model, one after another without a gap."""
        shapes = recipe.spec.weight_shapes()
        parts = {name: _parts(name, shape, recipe) for name, shape in shapes.items()}
        ordered = sorted(
            (part for row in parts.values() for part in row), key=lambda part: _section(part.name)
        )  # a stable sort: within a section the order stays canonical
        entries, ends, end = {}, {}, 0
        for part in ordered:
            shape = [*part.shape]
            if part.element == "int4":
                shape[-1] //= 2
            begin, end = end, end + part.nbytes
            ends[part.name] = begin, end
            entries[part.name] = {
                "dtype": ELEMENT[part.element], "shape": shape, "data_offsets": [begin, end],
            }  # fmt: skip
        table = {"__metadata__": {"format": "pt"}, **entries}
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        header = len(text).to_bytes(8, "little") + text
        ranges = {name: (len(header) + a, len(header) + b) for name, (a, b) in ends.items()}
        return cls(header=header, ranges=ranges, parts=parts)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, scales included."""
        return self.nbytes - len(self.header)

    @property
    def nbytes(self) -> int:
        """Size of the file, its header included."""
        return max(end for _, end in self.ranges.values())


def _parts(name: str, shape: tuple[int, ...], recipe: Recipe) -> tuple[StoredPart, ...]:
    scheme = recipe.schemes.get(name)
    if scheme is None:
        return (StoredPart(name, shape, recipe.activation),)
    return tuple(stored_parts(name, shape, scheme, recipe.activation, recipe.layout(name)))


def _section(name: str) -> int:
    """Weights and codes first, then what they have besides, each kind together."""
    suffixes = (SCALE, ZERO_POINT, MINIMUM)
    return next((i for i, suffix in enumerate(suffixes, 1) if name.endswith(suffix)), 0)


def stream_weights(
    checkpoint: Checkpoint, recipe: Recipe, directory: Path, progress: Progress | None = None
) -> str:
    """Write `weights.safetensors` into `directory`; returns the checkpoint's fingerprint.

    A weight is hashed beside the writing of the next, while its pages are still in memory.

    Raises MistralcError naming the tensor when a weight is not finite, in the checkpoint or after
    conversion.
    """
    layout = Layout.of(recipe)
    with (
        (directory / FILE_NAME).open("wb", buffering=0) as file,
        ThreadPoolExecutor(1) as hasher,
    ):
        digests = {}
        try:
            _write(file, 0, layout.header)
            for name in recipe.spec.weight_shapes():
                for count in _weight(checkpoint, recipe, name, layout, file):
                    if progress is not None:
                        progress(count)
                digests[name] = hasher.submit(checkpoint.digest, name)
        except BaseException:
            hasher.shutdown(cancel_futures=True)
            raise
        return checkpoint.fingerprint({name: found.result() for name, found in digests.items()})


def link_weights(model: ir.Model, recipe: Recipe, directory: Path) -> None:
    """Make the graph's weights point into the `weights.safetensors` of `directory`."""
    ranges = Layout.of(recipe).ranges
    for value in model.graph.initializers.values():
        weight = weight_of(value)
        if weight is None:
            continue
        parts = [ranges[part] for part in weight.parts]
        if any(end != begin for (_, end), (begin, _) in pairwise(parts)):
            raise ValueError(f"the parts of {weight!r} do not lie next to each other")
        begin, end = parts[0][0], parts[-1][1]
        value.const_value = ir.ExternalTensor(
            FILE_NAME, begin, end - begin, weight.dtype,
            shape=weight.shape, name=str(weight.name), base_dir=directory,
        )  # fmt: skip


def _weight(
    checkpoint: Checkpoint, recipe: Recipe, name: str, layout: Layout, file: BinaryIO
) -> Iterator[int]:
    """Write one weight, all its parts; yields the bytes written, block by block."""
    stored = checkpoint.tensor(name)
    check_finite(name, stored)
    at = [layout.ranges[part.name][0] for part in layout.parts[name]]
    calibrated = recipe.calibrated(name)
    source = checkpoint.bytes_of(name)
    as_it_is = name not in recipe.schemes and not calibrated
    if as_it_is and source is not None and TORCH_FLOATS[source.dtype] == recipe.stored:
        yield from _moved(source, stored, file, at[0])
        return
    if recipe.stored is torch.float16:
        _check_range(name, stored)
    # What calibration decided is for the weight as a whole, a layer's linear at the most.
    size = QUANTIZED if name in recipe.schemes else BLOCK
    rows = len(stored) if calibrated else max(1, size // max(1, stored[0].numel() * 4))
    exact = recipe.repacked.get(name)
    blocks = stored.split(rows) if exact is None else [stored]
    for block in blocks:
        written = 0
        parts = _converted(recipe, name, block) if exact is None else _packed(recipe, name, exact())
        for i, part in enumerate(parts):
            _write(file, at[i], part.flatten().view(torch.uint8).numpy().data)
            at[i] += part.nbytes
            written += part.nbytes
        yield written


def _converted(recipe: Recipe, name: str, weight: torch.Tensor) -> list[torch.Tensor]:
    """Some rows of a weight as their parts."""
    weight = recipe.smoothed(name, weight)
    if name not in recipe.schemes:
        return [weight.to(recipe.stored).contiguous()]
    return _packed(recipe, name, recipe.quantized(name, weight))


def _packed(recipe: Recipe, name: str, weight: Quantized) -> list[torch.Tensor]:
    return pack(weight, recipe.stored, recipe.layout(name))


def _check_range(name: str, tensor: torch.Tensor) -> None:
    least, most = tensor.aminmax()
    largest = max(abs(float(least)), abs(float(most)))
    if largest > LARGEST_FLOAT16:
        raise MistralcError(
            f"The weight {name} has values up to {largest:.3g}, beyond float16's 65504. Export "
            "with --precision bf16, which has float32's range."
        )


def _moved(source: ByteRange, stored: torch.Tensor, file: BinaryIO, at: int) -> Iterator[int]:
    """Move bytes from file to file without reading them, or from the mapping if that is refused."""
    done = 0
    with source.path.open("rb") as origin:
        while done < source.length:
            try:
                count = os.copy_file_range(
                    origin.fileno(), file.fileno(), source.length - done,
                    source.offset + done, at + done,
                )  # fmt: skip
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                break
            done += count
            yield count
    if done < source.length:
        _write(file, at + done, stored.flatten().view(torch.uint8).numpy().data[done:])
        yield source.length - done


def _write(file: BinaryIO, at: int, data: bytes | memoryview) -> None:
    """Write all of `data` at byte `at`; one system call takes 2 GB at most and may take less."""
    rest = memoryview(data)
    while rest:
        count = os.pwrite(file.fileno(), rest, at)
        rest, at = rest[count:], at + count
