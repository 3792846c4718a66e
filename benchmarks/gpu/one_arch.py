"""Zero the GPU code of all architectures but one in a CUDA library, so that it packs small.

nvcc puts a library's GPU code into the section `.nv_fatbin`: a row of fat binaries, each with one
entry for every architecture. The driver takes the entry of the GPU at hand. Zeroed entries keep
their headers and places, so the library loads as before, and compress to nothing.

The layout is not documented by NVIDIA; these fields were found in the files themselves:

    fat binary  magic u32, version u16, header bytes u16, bytes of all entries u64
    entry       kind u16 (1 PTX, 2 machine code), version u16, header bytes u32, bytes u64, ...,
                architecture u32 at byte 28, such as 90 for compute capability 9.0
"""

import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from graphs.errors import MistralcError

SECTION = ".nv_fatbin"
MAGIC = 0xBA55ED50
BINARY = struct.Struct("<IHHQ")
ENTRY = struct.Struct("<HHIQ")
ARCHITECTURE = struct.Struct("<I")
ARCHITECTURE_AT = 28
STEP = 8  # bytes to which binaries are aligned


@dataclass(frozen=True, slots=True)
class Entry:
    """The code of one architecture: where its bytes lie in the section."""

    architecture: int
    begin: int
    end: int


def keep_one(data: bytearray, section: tuple[int, int], architecture: int) -> int:
    """Zero all entries in `data[section]` but those of `architecture`; returns the bytes kept.

    Raises MistralcError if the library has no code for that architecture.
    """
    begin, end = section
    kept = 0
    found = set()
    for entry in entries(memoryview(data)[begin:end]):
        found.add(entry.architecture)
        size = entry.end - entry.begin
        if entry.architecture == architecture:
            kept += size
        else:
            data[begin + entry.begin : begin + entry.end] = bytes(size)
    if architecture not in found:
        raise MistralcError(
            f"The library has GPU code for the architectures {sorted(found)}, and {architecture} "
            "was asked for. Give one of these, such as 90 for compute capability 9.0."
        )
    return kept


def entries(section: memoryview) -> Iterator[Entry]:
    """Every entry of every fat binary in the section."""
    at = 0
    while at + BINARY.size <= len(section):
        magic, _, header, size = BINARY.unpack_from(section, at)
        if magic != MAGIC:
            at += STEP
            continue
        entry, end = at + header, at + header + size
        while entry < end:
            _, _, entry_header, entry_size = ENTRY.unpack_from(section, entry)
            (architecture,) = ARCHITECTURE.unpack_from(section, entry + ARCHITECTURE_AT)
            code = entry + entry_header
            yield Entry(architecture, code, code + entry_size)
            entry = code + entry_size
        at = end


def section_of(library: Path) -> tuple[int, int]:
    """Begin and end of the GPU code in the file. Raises MistralcError if it has none."""
    lines = subprocess.run(
        ["readelf", "--sections", "--wide", library], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for line in lines:
        fields = line.partition("]")[2].split()
        if fields and fields[0] == SECTION:
            begin, size = int(fields[3], 16), int(fields[4], 16)
            return begin, begin + size
    raise MistralcError(f"{library} has no section {SECTION}; expected a library made by nvcc.")
