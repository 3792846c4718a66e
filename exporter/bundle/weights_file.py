"""Stream the weights into one `weights.safetensors`, block by block. Knows nothing about operators.

The file is an ordinary safetensors file with the checkpoint's canonical names, so any tool reads
it. Its byte ranges are also the ONNX external data of `model.onnx` in the same directory. All
weights come first, in canonical order, then the scales of the quantized ones, then their zero
points or minimums. So a merged weight (such as q, k and v) is one range that spans its neighbours,
likewise its scales, and the file does not depend on the graph.

The kernel copies bytes that need no conversion, and shares them with the checkpoint if the file
system can. The rest is converted a block at a time.
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
from exporter.checkpoint.quantized.value import Quantized
from exporter.checkpoint.read_ahead import ReadAhead
from exporter.checkpoint.stored import TORCH_FLOATS, ByteRange
from exporter.quantization.packing import pack
from exporter.quantization.recipe import Recipe
from exporter.quantization.reference import split_rows
from graphs.dtypes import ELEMENT_TYPES
from graphs.errors import MistralcError
from graphs.passes.weight_ref import weight_of
from graphs.quant_scheme import MINIMUM, SCALE, ZERO_POINT, StoredPart, stored_parts

FILE_NAME = "weights.safetensors"

ALIGNMENT = 64  # bytes, of the first tensor: suits any vector load from a mapped file
BLOCK = 1 << 25  # bytes converted or copied at once: 32 MiB
QUANTIZED_BLOCK = 1 << 22  # bytes in float32 that are quantized at once, in about six copies
LARGEST_FLOAT16 = torch.finfo(torch.float16).max

Progress = Callable[[int], None]  # called with the number of bytes just written


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsLayout:
    """The header of the file, and the byte range of each tensor, known before it is written.

    `parts` are the tensors in which each weight is stored, by the weight's name.
    """

    header: bytes
    ranges: Mapping[str, tuple[int, int]]  # begin and end, from the start of the file
    parts: Mapping[str, tuple[StoredPart, ...]]

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """Lay out all weights of the recipe's model without gaps."""
        shapes = recipe.spec.weight_shapes()
        parts = {name: _parts(name, shape, recipe) for name, shape in shapes.items()}
        ordered = sorted(
            (part for row in parts.values() for part in row), key=lambda part: _section(part.name)
        )  # a stable sort: within a section the order stays canonical
        entries, ends, end = {}, {}, 0
        for part in ordered:
            shape = [*part.shape]
            element = ELEMENT_TYPES[part.element]
            if element.bits < 8:  # packed into bytes, and stored as such
                shape[-1] = element.nbytes(shape[-1])
            begin, end = end, end + part.nbytes
            ends[part.name] = begin, end
            entries[part.name] = {
                "dtype": element.safetensors, "shape": shape, "data_offsets": [begin, end],
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
    """Order the sections: weights and codes, then scales, zero points and minimums."""
    suffixes = (SCALE, ZERO_POINT, MINIMUM)
    return next((i for i, suffix in enumerate(suffixes, 1) if name.endswith(suffix)), 0)


def stream_weights(
    checkpoint: Checkpoint, recipe: Recipe, directory: Path, progress: Progress | None = None
) -> str:
    """Write `weights.safetensors` into `directory`; returns the checkpoint's fingerprint.

    Each weight is hashed while the next is written, so its pages are still in memory. Raises
    MistralcError naming the weight that is not finite in the checkpoint, or not in float16's range.
    """
    layout, read = WeightsLayout.of(recipe), ReadAhead(checkpoint)
    with (
        (directory / FILE_NAME).open("wb", buffering=0) as file,
        ThreadPoolExecutor(1) as hasher,
    ):
        digests = {}
        try:
            _write(file, 0, layout.header)
            for name in recipe.spec.weight_shapes():
                read.ahead(name)
                for count in _write_weight(checkpoint, recipe, name, layout, file):
                    if progress is not None:
                        progress(count)
                digests[name] = hasher.submit(checkpoint.digest, name)
        except BaseException:
            hasher.shutdown(cancel_futures=True)
            raise
        return checkpoint.fingerprint({name: found.result() for name, found in digests.items()})


def link_weights(model: ir.Model, recipe: Recipe, directory: Path) -> None:
    """Make the graph's weights refer to byte ranges of `weights.safetensors` in `directory`."""
    ranges = WeightsLayout.of(recipe).ranges
    for value in model.graph.initializers.values():
        weight = weight_of(value)
        if weight is None:
            continue
        parts = [ranges[part] for part in weight.parts]
        if any(end != begin for (_, end), (begin, _) in pairwise(parts)):
            raise ValueError(f"the parts of {weight!r} are not adjacent")
        begin, end = parts[0][0], parts[-1][1]
        value.const_value = ir.ExternalTensor(
            FILE_NAME, begin, end - begin, weight.dtype,
            shape=weight.shape, name=str(weight.name), base_dir=directory,
        )  # fmt: skip


def _write_weight(
    checkpoint: Checkpoint, recipe: Recipe, name: str, layout: WeightsLayout, file: BinaryIO
) -> Iterator[int]:
    """Write all parts of one weight; yields the number of bytes written, block by block."""
    at = [layout.ranges[part.name][0] for part in layout.parts[name]]
    exact = recipe.repacked.get(name)
    if exact is not None:
        blocks = _carried(recipe, name, exact())
    else:
        stored, source = checkpoint.tensor(name), checkpoint.bytes_of(name)
        check_finite(name, stored)
        unchanged = name not in recipe.schemes and not recipe.calibrated(name)
        if unchanged and source is not None and TORCH_FLOATS[source.dtype] == recipe.stored:
            yield from _copy(source, stored, file, at[0])
            return
        if recipe.stored is torch.float16:
            _check_range(name, stored)
        blocks = _blocks(recipe, name, stored)
    if recipe.layout(name) == "transposed":
        blocks = iter([_side_by_side(blocks, layout.parts[name])])
    for parts in blocks:
        written = 0
        for i, part in enumerate(parts):
            _write(file, at[i], part.flatten().view(torch.uint8).numpy().data)
            at[i] += part.nbytes
            written += part.nbytes
        yield written


def _blocks(recipe: Recipe, name: str, stored: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Convert a weight into its parts, some rows at a time where no row depends on another."""
    rows = _rows_at_once(stored, QUANTIZED_BLOCK if name in recipe.schemes else BLOCK)
    if recipe.calibrated(name):
        # Calibration decides about a weight as a whole, which is a linear of one layer at most.
        rows = len(stored)
    for block in stored.split(rows):
        weight = recipe.smoothed(name, block)
        if name in recipe.schemes:
            yield _packed(recipe, name, recipe.quantized(name, weight))
        else:
            yield [weight.to(recipe.stored).contiguous()]


def _carried(recipe: Recipe, name: str, weight: Quantized) -> Iterator[list[torch.Tensor]]:
    """Pack codes that the checkpoint already has, some rows at a time."""
    for numbers in (weight.scale, weight.minimum):
        if numbers is not None:
            check_finite(name, numbers)
    if not ELEMENT_TYPES[weight.scheme.codes].is_integer:  # float8 has codes that are NaN
        check_finite(name, weight.codes.float())
    for part in split_rows(weight, _rows_at_once(weight.codes, BLOCK)):
        yield _packed(recipe, name, part)


def _rows_at_once(weight: torch.Tensor, size: int) -> int:
    """How many rows have `size` bytes as float32: an even number, two of 4 bits share a byte."""
    return max(2, size // max(1, weight[0].numel() * 4)) // 2 * 2


def _packed(recipe: Recipe, name: str, weight: Quantized) -> list[torch.Tensor]:
    return pack(weight, recipe.stored, recipe.layout(name))


def _side_by_side(
    blocks: Iterator[list[torch.Tensor]], parts: tuple[StoredPart, ...]
) -> list[torch.Tensor]:
    """Join blocks of columns; holds the codes of one whole weight."""
    whole: list[torch.Tensor] = []
    at = [0] * len(parts)
    for block in blocks:
        for i, piece in enumerate(block):
            if i == len(whole):
                width = ELEMENT_TYPES[parts[i].element].nbytes(parts[i].shape[-1]) // piece.itemsize
                whole.append(piece.new_empty(*piece.shape[:-1], width))
            whole[i][..., at[i] : at[i] + piece.shape[-1]] = piece
            at[i] += piece.shape[-1]
    return whole


def _check_range(name: str, tensor: torch.Tensor) -> None:
    least, most = tensor.aminmax()
    largest = max(abs(float(least)), abs(float(most)))
    if largest > LARGEST_FLOAT16:
        raise MistralcError(
            f"The weight {name} has values up to {largest:.3g}, beyond float16's 65504. Export "
            "with --precision bf16, which has the range of float32."
        )


def _copy(source: ByteRange, stored: torch.Tensor, file: BinaryIO, at: int) -> Iterator[int]:
    """Let the kernel copy bytes from file to file; if it cannot, write them from the mapping."""
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
    """Write all of `data` at byte `at`; one system call writes at most 2 GB, and maybe less."""
    rest = memoryview(data)
    while rest:
        count = os.pwrite(file.fileno(), rest, at)
        rest, at = rest[count:], at + count
