"""Pack one folder for a first session on a GPU whose host has no package index.

    python -m benchmarks.gpu.pack OUT [--architecture 90] [--python 3.12] [--cache build/stubs]

The folder has at most 62 MB: onnxruntime-gpu with the GPU code of one architecture, our sources,
the few packages that such a host lacks, and graphs without weights. The host needs a driver, and
Python with torch (with CUDA), onnx, numpy, safetensors, tokenizers, typer, jinja2 and
cuda-bindings. There: `python OUT/start.py correctness`, then `python OUT/start.py speed`.
"""

import argparse
import io
import lzma
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.gpu.one_arch import keep_one, section_of
from benchmarks.gpu.shapes import Shapes, large, small, write_shapes
from benchmarks.gpu.stubs import provider
from graphs.errors import MistralcError

ROOT = Path(__file__).resolve().parents[2]
LARGEST = 62_000_000  # bytes
H100, PYTHON = 90, "3.12"
PACKAGES = ("onnx-ir", "onnxscript", "packaging", "flatbuffers")
"""Pure Python that the steps import and the host lacks, in the versions of constraints.txt."""
SOURCES = ("graphs", "runtime", "exporter", "benchmarks/gpu")
SINGLE = ("benchmarks/__init__.py", "constraints.txt", "pyproject.toml")
RUNTIME_PARTS = ("__init__.py", "backend", "capi")
"""Of the package onnxruntime; the tools for making models stay behind."""
NOT_LOADED = ("libonnxruntime.so", "libonnxruntime_providers_tensorrt.so")
"""The C interface for other programs: Python's module has the runtime inside."""
SMALLEST = 9 | lzma.PRESET_EXTREME  # preset of xz
DICTIONARY = 1 << 28  # bytes back that repetitions are looked for


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--architecture",
        type=int,
        default=H100,
        help="of the GPU, such as 90 for compute capability 9.0",
    )
    parser.add_argument("--python", default=PYTHON, help="of the host, such as 3.12")
    parser.add_argument(
        "--cache",
        type=Path,
        default=ROOT / "build" / "stubs",
        help="where downloads and the packed ONNX Runtime are kept",
    )
    given = parser.parse_args()  # fmt: skip
    try:
        size = pack(given.out, given.cache, given.architecture, given.python, [*small(), *large()])
    except MistralcError as error:
        print(f"pack: {error}", file=sys.stderr)
        return 1
    print(f"{given.out}: {size / 1e6:.1f} MB, {LARGEST / 1e6:.0f} allowed")
    return 0


def pack(
    out: Path,
    cache: Path,
    architecture: int,
    python: str,
    shapes: Iterable[Shapes],
    preset: int = SMALLEST,
) -> int:
    """Write the folder `out`, which is replaced; returns its bytes.

    Raises MistralcError if it is larger than LARGEST, unless `preset` gives up size for speed.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    shutil.copy(packed_runtime(cache, architecture, python, preset), out / "onnxruntime.tar.xz")
    write_archive(out / "sources.tar.xz", sources(), preset)
    write_archive(out / "shapes.tar.xz", written_shapes(shapes, cache / "shapes"), preset)
    download(out / "wheels", python)
    shutil.copy(Path(__file__).with_name("start.py"), out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if size > LARGEST and preset == SMALLEST:
        raise MistralcError(
            f"The packed folder has {size:,} bytes; expected at most {LARGEST:,}. Give another "
            "--architecture, or fewer shapes in benchmarks/gpu/shapes.py."
        )
    return size


def packed_runtime(cache: Path, architecture: int, python: str, preset: int) -> Path:
    """onnxruntime-gpu for one architecture as an archive in `cache`; made once, in 2 minutes."""
    package = provider.unpacked(cache, python)
    kind = "" if preset == SMALLEST else f"-preset{preset}"
    archive = cache / f"{package.name}-sm{architecture}{kind}.tar.xz"
    if not archive.exists():
        part = archive.with_suffix(".part")
        write_archive(part, runtime_files(package, architecture), preset)
        part.rename(archive)
    return archive


def runtime_files(package: Path, architecture: int) -> Iterator[tuple[str, bytes]]:
    """The files that Python needs of the package, the GPU code reduced to one architecture."""
    root = package / "onnxruntime"
    for part in RUNTIME_PARTS:
        for path in files_below(root / part):
            if path.name.startswith(NOT_LOADED):
                continue
            data = bytearray(path.read_bytes())
            if str(path).endswith(provider.CUDA_LIBRARY):
                keep_one(data, section_of(path), architecture)
            yield path.relative_to(package).as_posix(), bytes(data)


def sources() -> Iterator[tuple[str, bytes]]:
    """The project's files that the steps import."""
    for name in (*SOURCES, *SINGLE):
        for path in files_below(ROOT / name):
            yield path.relative_to(ROOT).as_posix(), path.read_bytes()


def written_shapes(shapes: Iterable[Shapes], directory: Path) -> Iterator[tuple[str, bytes]]:
    """Write the graphs without weights, and yield their files."""
    shutil.rmtree(directory, ignore_errors=True)
    for one in shapes:
        write_shapes(one, directory / one.name)
    for path in files_below(directory):
        yield path.relative_to(directory).as_posix(), path.read_bytes()


def files_below(path: Path) -> list[Path]:
    """The file itself, or all files of a folder but Python's caches, in order."""
    if path.is_file():
        return [path]
    return [each for each in sorted(path.rglob("*"))
            if each.is_file() and "__pycache__" not in each.parts]  # fmt: skip


def write_archive(path: Path, files: Iterable[tuple[str, bytes]], preset: int = SMALLEST) -> None:
    """Write files, by name in the archive, as .tar.xz; the same files give the same bytes."""
    compress: dict[str, int] = {"id": lzma.FILTER_LZMA2, "preset": preset}
    if preset == SMALLEST:
        compress["dict_size"] = DICTIONARY
    filters = [{"id": lzma.FILTER_X86}, compress]  # the first saves 3% of machine code
    with (
        lzma.open(path, "wb", format=lzma.FORMAT_XZ, filters=filters) as compressed,
        tarfile.open(fileobj=compressed, mode="w|") as archive,
    ):
        for name, data in files:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o644
            archive.addfile(entry, io.BytesIO(data))


def download(directory: Path, python: str) -> None:
    """Download PACKAGES for a Python such as "3.12" into `directory`."""
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
         "--only-binary=:all:", "--python-version", python, "--dest", directory,
         "--constraint", ROOT / "constraints.txt", *PACKAGES],
        check=True,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
