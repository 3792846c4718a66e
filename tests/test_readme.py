"""The README's commands are run as they stand there, and print what it says they print."""

import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Command

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONSOLE = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
BASH = re.compile(r"^```(?:bash|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PLACEHOLDERS = ("CHECKPOINT", "BUNDLE", "OTHER", "TABLE", "REPORT", "FILE", "REPOSITORY")
CANNOT_RUN = {  # commands of docs/*.md that no test runs, by how they begin, and why
    "podman ": "needs a container engine, and images from a registry",
    "pip install ": "needs a package index",
    "cd ": "test_run_archive.py runs the commands that follow, in an environment of their own",
    "python run.pyz ": "the same",
    "mistralc serve ": "ends when it is told to; test_serve_openai.py starts it",
    "serve run ": "needs the extra ray; test_serve_ray.py runs it",
    "tritonserver ": "needs Triton; test_triton.py calls the model as it would",
}


def console_commands(text: str) -> Iterator[tuple[str, str]]:
    """Each `$ command` of the console blocks, without its comment, and the output shown below."""
    for block in CONSOLE.findall(text):
        for entry in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = entry.partition("\n")
            yield command.partition(" # ")[0].strip(), output


def document_commands(document: Path) -> list[str]:
    """The commands of a document's console and bash blocks, in their order."""
    text = document.read_text(encoding="utf-8")
    commands = [command for command, _ in console_commands(text)]
    lines = (line for block in BASH.findall(text) for line in block.splitlines())
    return commands + [line.partition(" # ")[0].strip() for line in lines if line.strip()]


def test_every_mistralc_command_of_the_readme_works_and_prints_what_it_shows(
    default_build: Path,
    sliding_checkpoint: Path,
    mistralc: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(default_build)
    ran = []
    for command, shown in console_commands((ROOT / "README.md").read_text(encoding="utf-8")):
        if not command.startswith("mistralc "):
            continue
        words = shlex.split(command.replace("path/to/Mistral-7B-v0.1", str(sliding_checkpoint)))
        ended = mistralc(*words[1:], stdin=b"")
        assert ended.code == 0, f"`{command}` failed: {ended.err}"
        if shown:
            assert ended.out == shown, f"`{command}` prints something else than the README says"
        ran.append(words[1])
    assert {"export", "generate", "chat", "inspect"} <= set(ran), "the README lost its examples"


def test_make_export_writes_the_bundle_that_the_readme_names() -> None:
    planned = subprocess.run(
        ["make", "--dry-run", "export"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "mistralc export smollm2 --output build/smollm2-cpu-fp32 " in planned


def test_make_alone_lists_every_target_that_the_readme_names() -> None:
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = {t for line in re.findall(r"make ((?:[a-z-]+ ?)+)", text) for t in line.split()}
    named = {t for t in targets if re.search(rf"^{t}:", (ROOT / "Makefile").read_text(), re.M)}
    assert {"export", "test", "lint", "type"} <= named
    assert all(f"make {target}" in listed for target in named)


def test_the_readme_lists_exactly_the_commands_that_there_are(mistralc: Command) -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `mistralc ([a-z]+)", table, re.MULTILINE))
    shown = mistralc("--help").out
    commands = set(re.findall(r"^│ ([a-z]+)  ", shown.partition("Commands")[2], re.MULTILINE))
    assert commands == documented, "`mistralc --help` and the README's table differ"


def test_options_named_in_the_documents_exist(
    mistralc: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")  # fewer cut the longest names
    commands = set(
        re.findall(r"^│ ([a-z]+)  ", mistralc("--help").out.partition("Commands")[2], re.MULTILINE)
    )
    helps = {name: mistralc(name, "--help").out for name in commands}
    for document in DOCUMENTS:
        for line in re.findall(r"mistralc ([a-z]+ [^\n`|]*)", document.read_text(encoding="utf-8")):
            name, *words = line.split()
            if name in commands:
                for option in re.findall(r"--[a-z][a-z-]+", " ".join(words)):
                    assert option in helps[name], f"{document.name}: {name} has no {option}"


def test_links_in_the_documents_lead_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


@pytest.mark.usefixtures("kept_traces")
@pytest.mark.parametrize("document", DOCUMENTS[1:], ids=lambda path: path.name)
def test_every_command_of_the_documents_runs(
    document: Path,
    plain_checkpoint: Path,
    sliding_bundle: Path,
    mistralc: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a tiny checkpoint and a tiny bundle; what a document makes is there for its next command.

    The checkpoint is the one without a window, whose chunks are long: `report` reads a long text.
    """
    places = {name: tmp_path / name.lower() for name in PLACEHOLDERS}
    places["CHECKPOINT"] = plain_checkpoint
    places["FILE"].write_text("It was a bright cold day in April. " * 60, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for command in document_commands(document):
        if command.startswith(tuple(CANNOT_RUN)):
            continue
        given = shlex.split(command)
        assert given[0] == "mistralc", f"{command}: run it here, or say in CANNOT_RUN why not"
        for name in {"BUNDLE", "OTHER"} & {*given}:
            if "export" not in given and not places[name].exists():
                shutil.copytree(sliding_bundle, places[name])
        words = [str(places.get(word, word)) for word in given]
        ended = mistralc(*words[1:], stdin=b"")
        assert ended.code == 0, f"`{command}` of {document.name} failed: {ended.err}{ended.out}"


def test_what_cannot_be_run_is_still_in_a_document() -> None:
    commands = [command for document in DOCUMENTS for command in document_commands(document)]
    for beginning in CANNOT_RUN:
        assert any(command.startswith(beginning) for command in commands), beginning


def test_scripts_named_in_the_documents_exist_with_their_options() -> None:
    found = 0
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for module, options in re.findall(r"`python (?:-m )?(tests[./][\w./]+)([^`]*)`", text):
            stem = ROOT / module.removesuffix(".py").replace(".", "/")
            script = next(p for p in (stem.with_suffix(".py"), stem / "__main__.py") if p.exists())
            for option in re.findall(r"--[a-z][a-z-]+", options):
                assert f'"{option}"' in script.read_text(encoding="utf-8"), f"{script}: {option}"
            found += 1
    assert found >= 4, "the documents lost the commands that make their figures"


def test_code_named_in_the_documents_is_where_they_say() -> None:
    """`NAME` (`package/file.py`) is defined or imported there; every file named exists."""
    pairs = 0
    tests = "\n".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")
    )
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for name, path in re.findall(r"`(\w+)`\s\(`([\w/]+\.py)`\)", text):
            source = (ROOT / path).read_text(encoding="utf-8")
            defined = rf"^(?:class |def )?{name}\b(?=[\(:\[]|: | =|, )"
            assert re.search(defined, source, re.MULTILINE), f"{document.name}: no {name} in {path}"
            pairs += 1
        for path in re.findall(
            r"`((?:calib|exporter|graphs|runtime|tests|benchmarks)/[\w/]+\.py)`", text
        ):
            assert (ROOT / path).is_file(), f"{document.name} names {path}"
        for name in re.findall(r"`(test_\w+)`", text):
            assert f"def {name}(" in tests, f"{document.name} names {name}"
    assert pairs > 20


def test_the_container_file_copies_what_there_is_and_installs_nothing_that_builds() -> None:
    text = (ROOT / "docs" / "Containerfile").read_text(encoding="utf-8")
    for line in re.findall(r"^COPY (?!--from)(.+) /src", text, re.MULTILINE):
        for name in line.split():
            assert (ROOT / name).exists(), f"the container file copies {name}"
    (extras,) = re.findall(r"'/src\[([\w,]+)\]'", text)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"]]
    for extra in extras.split(","):
        wanted += project["optional-dependencies"][extra]
    packages = {re.split(r"[>=\[<]", one)[0] for one in wanted}
    assert "onnxruntime" in packages
    assert not packages & {"torch", "onnx", "onnx-ir", "onnxscript", "gguf", "safetensors"}
    assert re.search(r"^USER (?!0|root)", text, re.MULTILINE), "it must not run as root"
