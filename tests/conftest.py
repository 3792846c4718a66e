"""What several test files share: the command line in process, tiny checkpoints, their bundles.

What takes long to make is made once per run: the worker processes of pytest-xdist share it.
"""

import fcntl
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

CONTEXT = 96  # tokens that `plain_bundle` holds: more than prompts here, few enough to fill
LONGEST = (
    "test_smollm2.py",
    "test_readme.py",
    "test_model_against_transformers.py",
    "test_engine.py",
    "test_trace.py",
    "test_serve_smollm2.py",
)
"""Files of half a minute and more. They come first: of two worker processes that share the files
out, one would wait at the end for the other's last long one. See `make test`."""

if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores: a thread of OpenMP for each
    os.environ.setdefault("OMP_NUM_THREADS", "1")


class Ended(NamedTuple):
    """How a command ended: its exit status, standard output, and standard error."""

    code: int
    out: str
    err: str


Command = Callable[..., Ended]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put `LONGEST` in front, in their order."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(autouse=True, scope="session")
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep hashes and matplotlib's caches of tests out of the user's home."""
    home = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        patch.setenv("MPLCONFIGDIR", str(home / "matplotlib"))
        yield home


@pytest.fixture
def mistralc(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`mistralc(*arguments, stdin=b"...")` runs the program in this process, and returns Ended."""

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
        assert isinstance(code, int), f"the program ended with {code!r}, which is no exit status"
        return Ended(code, *capsys.readouterr())

    return run


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """`once(name, make)` is a path at which the first process to ask let `make(path)` write.

    The others wait until it is there, whole.
    """
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if own.name.startswith("popen-") else own  # workers of one run share it

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
    """A checkpoint of 100,000 random weights with a window of 8 tokens. Do not change it."""
    from tests.support.make_checkpoint import tiny_spec, write_checkpoint

    return once("sliding/tiny", lambda path: write_checkpoint(path, tiny_spec(window=8)))


@pytest.fixture(scope="session")
def plain_checkpoint(once: Once) -> Path:
    """The same without a window. Do not change it."""
    from tests.support.make_checkpoint import tiny_spec, write_checkpoint

    return once("plain/tiny", lambda path: write_checkpoint(path, tiny_spec()))


@pytest.fixture(scope="session")
def sliding_bundle(once: Once, sliding_checkpoint: Path) -> Path:
    """The bundle of `sliding_checkpoint`: window 8, chunk 8, a ring of 16 slots."""
    from exporter.export import ExportOptions, export

    return once("sliding/bundle", lambda b: export(str(sliding_checkpoint), b, ExportOptions()))


@pytest.fixture(scope="session")
def plain_bundle(once: Once, plain_checkpoint: Path) -> Path:
    """The bundle of `plain_checkpoint`, whose text ends at `CONTEXT` tokens."""
    from exporter.export import ExportOptions, export

    options = ExportOptions(context=CONTEXT, chunk=8)
    return once("plain/bundle", lambda bundle: export(str(plain_checkpoint), bundle, options))


@pytest.fixture(scope="session")
def rounded_bundle(once: Once, plain_checkpoint: Path) -> Path:
    """`plain_bundle` with weights in 8 bits, nothing calibrated."""
    from exporter.export import ExportOptions, export

    options = ExportOptions(precision="int8wo", context=CONTEXT, chunk=8)
    return once("plain/rounded", lambda bundle: export(str(plain_checkpoint), bundle, options))


@pytest.fixture(scope="module")
def kept_traces() -> Iterator[None]:
    """Let exports in this process take copies of the traces that `tests/support/tiny.py` keeps.

    Tracing is most of a tiny export. `test_trace.py` shows that a trace made anew is the same.
    """
    from tests.support import tiny

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("exporter.export.trace", tiny.traced)
        yield


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """`copy_of(bundle)` is a copy that a test may damage, alone in a directory of its own."""
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
    """A folder in which `make export` has done its work for the CPU: half a minute, once a run."""
    from exporter.export import ExportOptions, export

    bundle = once(
        "default/build/smollm2-cpu-fp32", lambda path: export("smollm2", path, ExportOptions())
    )
    return bundle.parent.parent
