"""What several test files share: the command line in process, tiny checkpoints, their bundles."""

import fcntl
import io
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

CONTEXT = 96  # tokens that `plain_bundle` holds: more than prompts here, few enough to fill


class Ended(NamedTuple):
    """How a command ended: its exit status, standard output, and standard error."""

    code: int
    out: str
    err: str


Command = Callable[..., Ended]


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


@pytest.fixture(scope="session")
def sliding_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 100,000 random weights with a window of 8 tokens. Do not change it."""
    from tests.make_checkpoint import tiny_spec, write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("sliding") / "tiny", tiny_spec(window=8))


@pytest.fixture(scope="session")
def plain_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a window. Do not change it."""
    from tests.make_checkpoint import tiny_spec, write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("plain") / "tiny", tiny_spec())


@pytest.fixture(scope="session")
def sliding_bundle(sliding_checkpoint: Path) -> Path:
    """The bundle of `sliding_checkpoint`: window 8, chunk 8, a ring of 16 slots."""
    from exporter.export import ExportOptions, export

    export(str(sliding_checkpoint), bundle := sliding_checkpoint.parent / "bundle", ExportOptions())
    return bundle


@pytest.fixture(scope="session")
def plain_bundle(plain_checkpoint: Path) -> Path:
    """The bundle of `plain_checkpoint`, whose text ends at `CONTEXT` tokens."""
    from exporter.export import ExportOptions, export

    options = ExportOptions(context=CONTEXT, chunk=8)
    export(str(plain_checkpoint), bundle := plain_checkpoint.parent / "bundle", options)
    return bundle


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """`copy_of(bundle)` is a copy that a test may damage, alone in a directory of its own."""
    return lambda path: Path(shutil.copytree(path, tmp_path / "copies" / path.name))


@pytest.fixture(scope="session")
def default_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `make export` has done its work for the CPU: half a minute, once a run."""
    from exporter.export import ExportOptions, export

    own = tmp_path_factory.getbasetemp()
    shared = own.parent if own.name.startswith("popen-") else own  # workers of one run share it
    bundle = shared / "default" / "build" / "smollm2-cpu-fp32"
    with (shared / "default.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not bundle.exists():
            bundle.parent.mkdir(parents=True)
            export("smollm2", bundle, ExportOptions())
    return shared / "default"
