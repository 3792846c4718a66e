"""Map the weights of an ONNX file into memory, so that TensorRT's copy is the only one."""

import mmap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray


class StoredWeight(NamedTuple):
    """The file and byte range in which the graph stores one weight."""

    name: str
    path: Path
    offset: int
    length: int


class MappedWeight(NamedTuple):
    """The bytes of one weight, uint8 [length], in a mapped file."""

    name: str
    data: NDArray[np.uint8]


def stored_weights(graph: Path) -> list[StoredWeight]:
    """Return every weight that an ONNX file keeps in another file, in the graph's order."""
    found = []
    for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place:
            path = graph.parent / place["location"]
            range_ = int(place["offset"]), int(place["length"])
            found.append(StoredWeight(tensor.name, path, *range_))
    return found


def map_weights(graph: Path) -> list[MappedWeight]:
    """Map the weights that an ONNX file keeps in other files.

    TensorRT's own loader reads them all into memory first: 14.5 GB for a 7B model, on top of the
    layouts that the builder makes of them.
    """
    files: dict[Path, NDArray[np.uint8]] = {}
    found = []
    for name, path, offset, length in stored_weights(graph):
        if path not in files:
            files[path] = _map_file(path)
        found.append(MappedWeight(name, files[path][offset : offset + length]))
    return found


def _map_file(path: Path) -> NDArray[np.uint8]:
    """Map a file without numpy.memmap, which would keep the path of its folder on the heap."""
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
