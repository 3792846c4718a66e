"""Weights, streamed block by block into one `weights.safetensors`. Knows no operator.

The file is an ordinary safetensors file under the checkpoint's canonical names, in their order, so
any tool reads it; and its byte ranges are at the same time the ONNX external data of `model.onnx`
in the same folder. A merged weight (q, k and v, say) is the range that spans its neighbours, so the
file does not depend on the graph and can be written while the graph is being traced.

Bytes that need no conversion are moved by the kernel, which shares them with the checkpoint where
the file system can. The rest is converted a block at a time.
"""

import errno
import json
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, Self

import onnx_ir as ir
import torch

from exporter.checkpoint import Checkpoint, check_finite
from exporter.stored import ByteRange
from graphs.errors import MistralcError
from graphs.spec import Dtype, ModelSpec
from graphs.weights import weight_of

FILE_NAME = "weights.safetensors"

# safetensors' and torch's names of the element types a bundle may hold
ELEMENT: dict[Dtype, tuple[str, torch.dtype]] = {
    "float32": ("F32", torch.float32),
    "float16": ("F16", torch.float16),
    "bfloat16": ("BF16", torch.bfloat16),
}
ALIGNMENT = 64  # bytes; of the first tensor, so that a mapped file suits any vector load
BLOCK = 1 << 25  # bytes converted or moved at once: 32 MiB
LARGEST_FLOAT16 = torch.finfo(torch.float16).max

Progress = Callable[[int], None]  # called with the number of bytes just written


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The file before it is written: its header, and where in the file each weight lies."""

    header: bytes
    ranges: dict[str, tuple[int, int]]  # begin and end, from the start of the file

    @classmethod
    def of(cls, spec: ModelSpec, dtype: Dtype) -> Self:
        """Lay out all weights of `spec` as `dtype`, one after another without a gap."""
        element, kind = ELEMENT[dtype]
        entries, ends, end = {}, {}, 0
        for name, shape in spec.weight_shapes().items():
            begin, end = end, end + math.prod(shape) * kind.itemsize
            ends[name] = begin, end
            entries[name] = {
                "dtype": element,
                "shape": list(shape),
                "data_offsets": [begin, end],
            }
        table = {"__metadata__": {"format": "pt"}, **entries}
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        header = len(text).to_bytes(8, "little") + text
        ranges = {name: (len(header) + a, len(header) + b) for name, (a, b) in ends.items()}
        return cls(header=header, ranges=ranges)

    @property
    def nbytes(self) -> int:
        """Size of the file, its header included."""
        return max(end for _, end in self.ranges.values())


def stream_weights(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    dtype: Dtype,
    directory: Path,
    progress: Progress | None = None,
) -> str:
    """Write `weights.safetensors` into `directory`; returns the checkpoint's fingerprint.

    A weight is hashed beside the writing of the next, while its pages are still in memory.

    Raises MistralcError naming the tensor when a weight is not finite, in the checkpoint or after
    conversion.
    """
    with (
        (directory / FILE_NAME).open("wb", buffering=0) as file,
        ThreadPoolExecutor(1) as hasher,
    ):
        digests = {}
        try:
            _write(file, Layout.of(spec, dtype).header)
            for name in spec.weight_shapes():
                for count in _weight(checkpoint, name, dtype, file):
                    if progress is not None:
                        progress(count)
                digests[name] = hasher.submit(checkpoint.digest, name)
        except BaseException:
            hasher.shutdown(cancel_futures=True)
            raise
        return checkpoint.fingerprint({name: found.result() for name, found in digests.items()})


def link_weights(model: ir.Model, spec: ModelSpec, dtype: Dtype, directory: Path) -> None:
    """Make the graph's weights point into the `weights.safetensors` of `directory`."""
    ranges = Layout.of(spec, dtype).ranges
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


def _weight(checkpoint: Checkpoint, name: str, dtype: Dtype, file: BinaryIO) -> Iterator[int]:
    """Write one weight; yields the bytes written, block by block."""
    stored = checkpoint.tensor(name)
    check_finite(name, stored)
    source = checkpoint.bytes_of(name)
    if source is not None and source.dtype == dtype:
        yield from _moved(source, stored, file)
        return
    kind = ELEMENT[dtype][1]
    if kind is torch.float16:
        _check_range(name, stored)
    rows = max(1, BLOCK // max(1, stored[0].numel() * 4))
    for block in stored.split(rows):
        converted = block.to(kind).contiguous()
        _write(file, converted.flatten().view(torch.uint8).numpy().data)
        yield converted.nbytes


def _check_range(name: str, tensor: torch.Tensor) -> None:
    least, most = tensor.aminmax()
    largest = max(abs(float(least)), abs(float(most)))
    if largest > LARGEST_FLOAT16:
        raise MistralcError(
            f"The weight {name} has values up to {largest:.3g}, beyond float16's 65504. Export "
            "with --precision bf16, which has float32's range."
        )


def _moved(source: ByteRange, stored: torch.Tensor, file: BinaryIO) -> Iterator[int]:
    """Move bytes from file to file without reading them, or from the mapping if that is refused."""
    done = 0
    with source.path.open("rb") as origin:
        while done < source.length:
            try:
                count = os.copy_file_range(
                    origin.fileno(), file.fileno(), source.length - done, source.offset + done
                )
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                break
            done += count
            yield count
    if done < source.length:
        _write(file, stored.flatten().view(torch.uint8).numpy().data[done:])
        yield source.length - done


def _write(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write all of `data`; one system call takes 2 GB at most and may take less."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
