"""`run.pyz`: what is in it, and that it runs a bundle where mistralc is not installed."""

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from exporter.bundle import run_archive
from graphs.manifest import read_manifest
from tests.conftest import Command

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("numpy", "tokenizers", "jinja2", "onnxruntime")  # what the documents promise is enough
PROMPT = ("generate", ".", "The ring turns", "-n", "5", "--json")

BUILD_TOOLS = {"onnx", "onnx_ir", "onnxscript", "torch", "safetensors", "gguf", "sentencepiece"}

DECOY = 'raise SystemExit("the decoy ran")\n'
FINDER = """
import sys
from importlib.machinery import PathFinder

class Finder:  # as a development installation puts it, only further to the front
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("runtime", "graphs"):
            return PathFinder.find_spec(name, [{path!r}] if path is None else path, target)

sys.meta_path.insert(0, Finder)
import runtime, graphs
"""


# What is in it


def modules(archive: Path) -> dict[str, str]:
    """Python sources of an archive by name."""
    with zipfile.ZipFile(archive) as file:
        return {name: file.read(name).decode() for name in file.namelist() if name.endswith(".py")}


def test_the_archive_has_its_entry_points_and_all_that_these_import_and_nothing_else(
    sliding_bundle: Path,
) -> None:
    found = modules(sliding_bundle / "run.pyz")
    assert {name.partition("/")[0] for name in found} == {"__main__.py", "runtime", "graphs"}
    entries = {"__main__.py", *(f"{n.replace('.', '/')}.py" for n in run_archive.ENTRY_POINTS)}
    assert entries <= found.keys()
    wanted = set(entries)
    for name, source in found.items():
        for module in imports(source):
            assert module.partition(".")[0] not in BUILD_TOOLS, f"{name} imports {module}"
            path = module.replace(".", "/") + ".py"
            if path.startswith(("graphs/", "runtime/")) and (ROOT / path).is_file():
                assert path in found, f"{name} imports {module}, which was left out"
                wanted.add(path)
    packages = {f"{folder}/__init__.py" for name in wanted for folder in folders(name)}
    assert found.keys() == wanted | packages


def imports(source: str) -> Iterator[str]:
    """Every module that a source file imports, and every name that could be one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def folders(name: str) -> list[str]:
    """The folders around a file of the archive."""
    return [parent.as_posix() for parent in PurePosixPath(name).parents if parent.name]


def test_what_only_a_build_host_uses_does_not_ship(sliding_bundle: Path) -> None:
    found = modules(sliding_bundle / "run.pyz")
    assert not [name for name in found if "passes" in name or "corpus" in name]
    assert "runtime/serve/ray_app.py" not in found, "Ray imports it from an installed mistralc"


def test_sources_are_those_of_the_packages_without_comments_and_module_docstrings(
    sliding_bundle: Path,
) -> None:
    for name, source in modules(sliding_bundle / "run.pyz").items():
        if name == "__main__.py":
            continue
        original = (ROOT / name).read_text(encoding="utf-8")
        expected, archived = ast.parse(original), ast.parse(source)
        if ast.get_docstring(expected) is not None:
            del expected.body[0]
        lines = ast.dump(archived, include_attributes=True)  # with the line of every node
        assert lines == ast.dump(expected, include_attributes=True), name
        assert "# noqa" not in source


def test_entries_are_in_order_and_say_nothing_of_when_or_by_whom(sliding_bundle: Path) -> None:
    with zipfile.ZipFile(sliding_bundle / "run.pyz") as file:
        entries = file.infolist()
    assert [entry.filename for entry in entries] == sorted(entry.filename for entry in entries)
    assert {entry.date_time for entry in entries} == {(1980, 1, 1, 0, 0, 0)}
    assert {entry.external_attr >> 16 for entry in entries} == {0o100644}
    assert {entry.compress_type for entry in entries} == {zipfile.ZIP_STORED}
    assert not any(entry.extra for entry in entries)


def test_data_files_of_the_runtime_come_along_and_leftovers_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "runtime"
    for name in ("__init__.py", "cli/__init__.py", "serve/__init__.py", "serve/page.html",
                 "serve/.page.html.swp", "serve/page.html~", "__pycache__/a.cpython-311.pyc",
                 ".hidden/a.py", "unused/__init__.py", "unused/data.txt"):  # fmt: skip
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_bytes(b"")
    (package / "run_pyz.py").write_bytes(b"import runtime.cli, runtime.serve\n")
    monkeypatch.setattr(
        run_archive, "runtime", SimpleNamespace(__file__=str(package / "__init__.py"))
    )
    found = {name for name in run_archive.contents() if name.startswith("runtime/")}
    assert found == {"runtime/__init__.py", "runtime/run_pyz.py", "runtime/cli/__init__.py",
                     "runtime/serve/__init__.py", "runtime/serve/page.html"}  # fmt: skip


def test_stripping_remarks_keeps_code_on_its_line() -> None:
    source = '"""What it is.\n\nMore."""\nx = "#1"  # why\n# a remark\ny = 2\n'
    assert run_archive.strip_remarks(source) == '\n\n\nx = "#1"\n\ny = 2\n'


def test_the_manifest_lists_the_archive_like_any_other_file(sliding_bundle: Path) -> None:
    entry = read_manifest(sliding_bundle).files["run.pyz"]
    assert entry.size == (sliding_bundle / "run.pyz").stat().st_size


# That it runs


def with_requirements(names: Sequence[str]) -> set[str]:
    """Distributions, and all that they require, by name."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name not in found:
            found.add(name)
            wanted = map(Requirement, importlib.metadata.requires(name) or ())
            waiting += [one.name for one in wanted if not one.marker or one.marker.evaluate()]
    return found


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a virtual environment with `NEEDED` and decoys for our packages.

    The libraries are links to those that run this test, so that no network is needed.
    """
    home = tmp_path_factory.mktemp("host")
    venv.create(home, symlinks=True, with_pip=False)
    (site,) = home.glob("lib/python*/site-packages")
    for name in with_requirements(NEEDED):
        distribution = importlib.metadata.distribution(name)
        tops = {file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}
        for top in tops - {"__pycache__"}:
            source = Path(str(distribution.locate_file(top))).resolve()
            if not (site / top).exists():
                (site / top).symlink_to(source)
    for package in ("runtime", "graphs"):
        (site / package).mkdir()
        (site / package / "__init__.py").write_text("", encoding="utf-8")
        for module in ("run_pyz", "cli", "load", "errors", "manifest"):
            (site / package / f"{module}.py").write_text(DECOY, encoding="utf-8")
    (site / "decoys.py").write_text(FINDER.replace("{path!r}", repr(str(site))), encoding="utf-8")
    (site / "decoys.pth").write_text("import decoys\n", encoding="utf-8")
    return home / "bin" / "python"


def run(
    python: Path, *command: object, cwd: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python there with an environment of its own."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "XDG_CACHE_HOME")}
    return subprocess.run([python, *map(str, command)], cwd=cwd, env={**kept, **environment},
                          capture_output=True, text=True, check=False)  # fmt: skip


def test_the_decoys_are_in_the_way_and_typer_is_not_there(host: Path, tmp_path: Path) -> None:
    # Otherwise the tests below would show nothing.
    for module in ("runtime.run_pyz", "graphs.errors"):
        done = run(host, "-c", f"import {module}", cwd=tmp_path)
        assert done.stderr == "the decoy ran\n"
    for module in ("typer", "rich", "torch", "onnx_ir", "mistralc"):
        assert run(host, "-c", f"import {module}", cwd=tmp_path).returncode == 1, module


def test_a_copied_bundle_generates_where_only_the_runtimes_dependencies_are(
    host: Path, mistralc: Command, sliding_bundle: Path, copy_of: Callable[[Path], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    bundle = copy_of(sliding_bundle)
    done = run(host, "run.pyz", *PROMPT, cwd=bundle)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    monkeypatch.chdir(sliding_bundle)
    here = json.loads(mistralc(*PROMPT).out)
    there = json.loads(done.stdout)
    assert (there["text"], there["finish_reason"]) == (here["text"], here["finish_reason"])


def test_doctor_of_the_archive_is_green(
    host: Path, sliding_bundle: Path, copy_of: Callable[[Path], Path]
) -> None:
    done = run(host, "run.pyz", "doctor", ".", "--json", cwd=copy_of(sliding_bundle))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["ok"] is True
    states = {check["name"]: check["state"] for check in result["checks"]}
    assert (states["files"], states["backend"], states["manifest"]) == ("ok", "ok", "ok")


def test_packages_of_our_names_in_the_current_directory_and_on_the_path_are_not_imported(
    host: Path, sliding_bundle: Path, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    archive = copy_of(sliding_bundle) / "run.pyz"
    for module in ("runtime.py", "graphs.py"):
        (tmp_path / module).write_text(DECOY, encoding="utf-8")
    # Importing a decoy shows that Python searches these directories.
    probe = run(host, "-c", "import runtime.run_pyz", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert probe.stderr == "the decoy ran\n"
    for command in (("inspect", archive.parent), ("chat", archive.parent), ("--version",), ("-h",)):
        done = run(host, archive, *command, cwd=tmp_path, PYTHONPATH=str(tmp_path))
        assert done.returncode == 0, done.stderr
        assert "decoy" not in done.stdout + done.stderr


def test_the_archive_finds_its_modules_after_the_directory_was_changed(
    host: Path, sliding_bundle: Path, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    # Commands import what they need when they run; a relative path would then be wrong.
    code = f"""
import os, runpy, sys
sys.argv = ["run.pyz", "-h"]
try:
    runpy.run_path("run.pyz", run_name="__main__")
except SystemExit:
    pass
os.chdir({str(tmp_path)!r})
import runtime.measure.perplexity
print(runtime.measure.perplexity.__file__)
"""
    bundle = copy_of(sliding_bundle)
    done = run(host, "-c", code, cwd=bundle)
    assert done.stdout.splitlines()[-1:] == [
        str(bundle / "run.pyz" / "runtime/measure/perplexity.py")
    ], done.stderr


def test_a_library_that_is_missing_is_named_with_the_command_that_installs_it(
    sliding_bundle: Path, tmp_path: Path
) -> None:
    venv.create(tmp_path / "bare", symlinks=True, with_pip=False)
    done = run(tmp_path / "bare/bin/python", "run.pyz", *PROMPT, cwd=sliding_bundle)
    assert done.returncode == 1
    assert re.fullmatch(
        r"run\.pyz: .* needs the package numpy.*pip install numpy .*\n", done.stderr
    )


def test_errors_of_the_archive_are_a_paragraph_and_a_status(host: Path, tmp_path: Path) -> None:
    archive = tmp_path / "run.pyz"
    run_archive.write_run_archive(tmp_path)
    for command, code, said in (
        (("inspect", "nothing"), 1, "run.pyz: There is no bundle at nothing."),
        (("generate", ".", "x", "--system", "y"), 2, "run.pyz: --system belongs to a chat"),
        (("generate", ".", "--bogus"), 2, "unrecognized arguments: --bogus"),
        (("bench", ".", "--repeat", "0"), 2, "argument --repeat: 0 is below 1"),
        (("nonsense",), 2, "There is no command 'nonsense'"),
        ((), 2, ""),
    ):
        done = run(host, archive, *command, cwd=tmp_path)
        assert done.returncode == code, done.stderr
        assert said in done.stderr
        assert "Traceback" not in done.stderr


def test_the_archive_of_another_python_process_is_the_same(tmp_path: Path) -> None:
    run_archive.write_run_archive(tmp_path)
    (tmp_path / "other").mkdir()
    code = ("import os; os.umask(0o077)\nfrom pathlib import Path\n"
            "from exporter.bundle import run_archive\n"
            f"run_archive.write_run_archive(Path({str(tmp_path / 'other')!r}))")  # fmt: skip
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Kathmandu"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
    assert (tmp_path / "run.pyz").read_bytes() == (tmp_path / "other" / "run.pyz").read_bytes()
