"""Shared fixtures: the command line in process, tiny checkpoints, their bundles.

Expensive files are made once per run; the worker processes of pytest-xdist share them.
"""

import fcntl
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

CONTEXT = 96  # tokens of `plain_bundle`: longer than the prompts here, short enough to fill
LONGEST = (
    "test_smollm2.py",
    "test_readme.py",
    "test_model_against_transformers.py",
    "test_engine.py",
    "test_trace.py",
    "test_serve_smollm2.py",
)
"""Test files that take half a minute and more. They run first: otherwise one of two workers could
idle at the end while the other runs the last long file. See `make test`."""

if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores: one OpenMP thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")


class Ended(NamedTuple):
    """How a command ended: exit status, standard output, standard error."""

    code: int
    out: str
    err: str


Command = Callable[..., Ended]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files of `LONGEST` first, in that order."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(autouse=True, scope="session")
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep caches of tests out of the user's home."""
    home = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        patch.setenv("MPLCONFIGDIR", str(home / "matplotlib"))
        yield home


@pytest.fixture
def mistralc(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`mistralc(*arguments, stdin=b"...")` runs the program in this process; returns Ended."""

    def run(*arguments: object, stdin: bytes = b"") -> Ended:
        import mistralc as program

        monkeypatch.setattr(sys, "argv", ["mistralc", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        try:
            program.main()
            code: object = 0
        except SystemExit as ended:
            code = ended.code
        assert isinstance(code, int), f"the program ended with {code!r} instead of an exit status"
        return Ended(code, *capsys.readouterr())

    return run


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """`once(name, make)` returns a path that `make(path)` writes once for all processes.

    The first process to ask writes it; the others wait until it is complete.
    """
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if own.name.startswith("popen-") else own  # shared by the workers of a run

    def made(name: str, make: Callable[[Path], object]) -> Path:
        path = shared / "once" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with (shared / f"{name.replace('/', '-')}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                make(unfinished := path.with_suffix(".unfinished"))
                unfinished.rename(path)
        return path

    return made


@pytest.fixture(scope="session")
def sliding_checkpoint(once: Once) -> Path:
    """A checkpoint of 100,000 random weights with a window of 8 tokens. Read-only."""
    from tests.support.make_checkpoint import tiny_spec, write_checkpoint

    return once("sliding/tiny", lambda path: write_checkpoint(path, tiny_spec(window=8)))


@pytest.fixture(scope="session")
def plain_checkpoint(once: Once) -> Path:
    """The same without a window. Read-only."""
    from tests.support.make_checkpoint import tiny_spec, write_checkpoint

    return once("plain/tiny", lambda path: write_checkpoint(path, tiny_spec()))


def _export(checkpoint: Path, bundle: Path, **options: Any) -> None:
    """Export with a new trace, even under `kept_traces`, whose names are numbered differently."""
    from exporter.decoder.trace import trace
    from exporter.export import export
    from exporter.options import ExportOptions

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("exporter.export.trace", trace)
        export(str(checkpoint), bundle, ExportOptions(**options))


@pytest.fixture(scope="session")
def sliding_bundle(once: Once, sliding_checkpoint: Path) -> Path:
    """The bundle of `sliding_checkpoint`: window 8, chunk 8, a ring of 16 slots."""
    return once("sliding/bundle", lambda bundle: _export(sliding_checkpoint, bundle))


@pytest.fixture(scope="session")
def plain_bundle(once: Once, plain_checkpoint: Path) -> Path:
    """The bundle of `plain_checkpoint` with a context of `CONTEXT` tokens."""
    options = {"context": CONTEXT, "chunk": 8}
    return once("plain/bundle", lambda bundle: _export(plain_checkpoint, bundle, **options))


@pytest.fixture(scope="session")
def rounded_bundle(once: Once, plain_checkpoint: Path) -> Path:
    """`plain_bundle` with 8-bit weights, not calibrated."""
    options = {"precision": "int8wo", "context": CONTEXT, "chunk": 8}
    return once("plain/rounded", lambda bundle: _export(plain_checkpoint, bundle, **options))


@pytest.fixture(scope="module")
def kept_traces() -> Iterator[None]:
    """Make exports in this process use the cached traces of `tests/support/tiny.py`.

    Most of the time of a tiny export is tracing. `test_trace.py` shows that a new trace is equal.
    """
    from tests.support import tiny

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("exporter.export.trace", tiny.traced)
        yield


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """`copy_of(bundle)` is a copy that a test may damage, in its own directory."""
    return lambda path: Path(shutil.copytree(path, tmp_path / "copies" / path.name))


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """`tmpfs(kib)` mounts a file system of that size in memory, or skips the test if it cannot."""
    mounted: list[Path] = []

    def mount(kib: int) -> Path:
        place = tmp_path / f"tmpfs-{len(mounted)}"
        place.mkdir()
        if os.geteuid() != 0:
            pytest.skip("mounting a file system needs root")
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"mounting a file system failed: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture(scope="session")
def default_build(once: Once) -> Path:
    """A folder with the CPU bundle of `make export`: half a minute, once per run."""
    from exporter.export import ExportOptions, export

    bundle = once(
        "default/build/smollm2-cpu-fp32", lambda path: export("smollm2", path, ExportOptions())
    )
    return bundle.parent.parent
