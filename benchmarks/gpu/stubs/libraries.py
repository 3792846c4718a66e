"""Build CUDA libraries that do nothing, so that ONNX Runtime's CUDA provider opens without a GPU.

The C sources beside this file hold the functions that must return something. All other functions
that the provider imports are generated: they are counted and succeed. So a new version of ONNX
Runtime needs no change here unless it depends on the result of a new function.

Memory of the "device" is host memory. Numbers are not computed; which node runs where, what is
copied and launched, and whether a CUDA graph is captured, is decided as on a GPU.
"""

import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

SOURCES = Path(__file__).parent
LIBRARIES: Mapping[str, str] = {
    "cudart": "libcudart.so.13",  # first: the others count their calls in it
    "cublas": "libcublas.so.13",
    "cublasLt": "libcublasLt.so.13",
    "curand": "libcurand.so.10",
    "cuda": "libcuda.so.1",
    "cudnn": "libcudnn.so.9",
}
"""The file name of each library; it is also the version of the symbols in it."""

OPTIONAL = "cudnn"  # the provider does without it; a PyTorch with CUDA does not
DRIVER_PREFIX = "cu"  # symbols of libcuda.so.1 have no version


def build(importers: Iterable[Path], directory: Path) -> None:
    """Compile every library of LIBRARIES into `directory`, with all that `importers` need.

    One of these is `libonnxruntime_providers_cuda.so`; others are libraries that a process loads
    beside it, such as those of a PyTorch with CUDA. Needs `cc` and `readelf`. Raises
    CalledProcessError with the compiler's message if a source does not compile.
    """
    directory.mkdir(parents=True, exist_ok=True)
    imported: dict[str, list[str]] = {}
    for importer in importers:
        for file, symbols in imports(importer).items():
            known = imported.setdefault(file, [])
            known += [symbol for symbol in symbols if symbol not in known]
    for name, file in LIBRARIES.items():
        if name == OPTIONAL and not imported.get(file):
            continue
        source = SOURCES / f"{name}.c"
        written = source.read_text() if source.exists() else ""
        compile_library(
            written + generated(imported[file], written), directory / file, counts=name == "cudart"
        )


def imports(library: Path) -> dict[str, list[str]]:
    """The functions that `library` imports, by the file name of the library they are in."""
    found: dict[str, list[str]] = {file: [] for file in LIBRARIES.values()}
    for symbol, version in _undefined(library):
        if version in found:
            found[version].append(symbol)
        elif not version and symbol.startswith(DRIVER_PREFIX) and symbol[2:3].isupper():
            found[LIBRARIES["cuda"]].append(symbol)
    return found


def generated(wanted: list[str], written: str) -> str:
    """C source for each function of `wanted` that the source `written` does not mention."""
    missing = (name for name in wanted if f"{name}(" not in written and f"({name})" not in written)
    return "\n".join(f"SUCCEEDS({name})" for name in missing) + "\n"


def compile_library(source: str, library: Path, *, counts: bool) -> None:
    """Compile C source into a shared library whose symbols have its file name as their version.

    `counts` says that it is the one that the others count their calls in.
    """
    with tempfile.TemporaryDirectory() as folder:
        file, versions = Path(folder) / "library.c", Path(folder) / "versions.map"
        file.write_text('#include "calls.h"\n' + source)
        versions.write_text(f"{library.name} {{ global: *; }};\n")
        subprocess.run(
            ["cc", "-std=c11", "-O1", "-shared", "-fPIC", "-fno-builtin", "-D_GNU_SOURCE",
             f"-I{SOURCES}", f"-Wl,--version-script={versions}", f"-Wl,-soname,{library.name}",
             "-Wall", "-Wextra", "-Werror", "-o", library, file,
             *([] if counts else [f"-L{library.parent}", f"-l:{LIBRARIES['cudart']}"]),
             "-lpthread"],
            check=True,
        )  # fmt: skip


def _undefined(library: Path) -> Iterator[tuple[str, str]]:
    """Name and version ("" if it has none) of each symbol that `library` imports."""
    lines = subprocess.run(
        ["readelf", "--dyn-syms", "--wide", library], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for line in lines:
        fields = line.split()
        if len(fields) >= 8 and fields[6] == "UND":
            symbol, _, version = fields[7].partition("@")
            yield symbol, version.lstrip("@")
