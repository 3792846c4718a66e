"""The README's commands are run as they stand there, and print what it says they print."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Command

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONSOLE = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)


def console_commands(text: str) -> Iterator[tuple[str, str]]:
    """Each `$ command` of the console blocks, without its comment, and the output shown below."""
    for block in CONSOLE.findall(text):
        for entry in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = entry.partition("\n")
            yield command.partition(" # ")[0].strip(), output


@pytest.fixture(scope="module")
def build_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `make export` has done its work, on the real default model."""
    from exporter.export import ExportOptions, export

    folder = tmp_path_factory.mktemp("readme")
    export("smollm2", folder / "build" / "smollm2-cpu-fp32", ExportOptions())
    return folder


def test_every_mistralc_command_of_the_readme_works_and_prints_what_it_shows(
    build_folder: Path,
    sliding_checkpoint: Path,
    mistralc: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(build_folder)
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


def test_options_named_in_the_documents_exist(mistralc: Command) -> None:
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
