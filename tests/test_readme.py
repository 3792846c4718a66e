"""Every command in a document is run or parsed, and prints what the document says it prints."""

import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.conftest import Command
from tests.support.documents import (
    DOCUMENTS,
    README,
    ROOT,
    between,
    block_commands,
    inline_commands,
)
from tests.support.documents.command_lines import FOREIGN, TOOLS, check, planned_by_make
from tests.support.documents.generate import PARTS, Part

PLACEHOLDERS = ("CHECKPOINT", "BUNDLE", "OTHER", "TABLE", "REPORT", "FILE", "REPOSITORY")
CHECKPOINTS = ("Mistral-7B-Instruct-v0.3", "Mistral-7B-v0.1")  # in documents; tiny ones here
CANNOT_RUN = {  # commands of ours that are parsed and not run, by how they begin, and why
    "mistralc serve ": "ends when it is told to; test_serve_openai.py starts it",
    "python ": "run.pyz in an environment of its own: test_run_archive.py; scripts take long",
    ".venv/bin/python ": "the tests themselves",
    "make ": "makes an environment first; what it would run is parsed",
    "pip install ": "needs a package index",
}


def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def run_instead(command: str) -> str:
    """The command of ours that a `make` command ends with; any other command itself."""
    if not command.startswith("make "):
        return command
    planned = planned_by_make(*shlex.split(command)[1:])
    return planned.splitlines()[-1].removeprefix(".venv/bin/")


def test_every_mistralc_command_of_the_readme_works_and_prints_what_it_shows(
    default_build: Path,
    sliding_checkpoint: Path,
    kept_traces: None,
    mistralc: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside the build of SmolLM2; a Mistral-7B is a tiny checkpoint here."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sliding_checkpoint, CHECKPOINTS[0])
    Path("build").mkdir()
    Path("build/smollm2-cpu-fp32").symlink_to(default_build / "build" / "smollm2-cpu-fp32")
    ran = []
    for command, shown in block_commands(text_of(README)):
        check(command)
        own = run_instead(command) if shown else command
        if not own.startswith("mistralc ") or own.startswith(tuple(CANNOT_RUN)):
            assert not shown, f"nobody compares what `{command}` prints"
            continue
        words = shlex.split(own)
        ended = mistralc(*words[1:], stdin=b"")
        assert ended.code == 0, f"`{command}` failed: {ended.err}"
        if shown:
            assert ended.out == shown, f"`{command}` prints something else than the README says"
        ran.append(words[1])
    assert {"export", "generate", "chat", "inspect"} <= set(ran), "the README lost its examples"


def test_make_export_writes_the_bundle_that_the_readme_names() -> None:
    planned = planned_by_make("export")
    assert "mistralc export smollm2 --output build/smollm2-rtx-fp16 --target rtx " in planned
    assert "mistralc export smollm2 --output build/smollm2-cpu-fp32 " in planned


def test_make_export_builds_only_what_was_chosen_and_calibrates_first_if_it_must() -> None:
    chosen = ["CHECKPOINT=there/Mistral-7B/", "TARGET=rtx", "PRECISION=int8"]
    planned = planned_by_make("export", *chosen)
    assert "--output build/Mistral-7B-rtx-int8 --target rtx --precision int8 " in planned
    assert planned.count("mistralc export ") == 1
    table = "build/Mistral-7B-int8.table"
    assert f"mistralc calibrate there/Mistral-7B/ --output {table} --precision int8" in planned
    assert f"--calibration {table}" in planned


def test_make_alone_lists_every_target_that_the_documents_name() -> None:
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = "\n".join(map(text_of, DOCUMENTS))
    named = {t for line in re.findall(r"make ((?:[a-z-]+ ?)+)", text) for t in line.split()}
    assert {"export", "test", "lint", "type", "docs", "bench-peers"} <= named & targets
    assert all(f"make {target} " in listed for target in targets)


RUN_BY_OTHERS = {"worker.py", "placement.py", "first_session.py", "start.py", "machine.py",
                 "correctness.py", "speed.py"}  # fmt: skip
"""Scripts that a script with a target of make runs, in this environment or in another."""


def test_every_script_that_measures_has_a_target_of_make() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for path in sorted((ROOT / "benchmarks").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8"):
            run = re.search(rf"-m {re.escape(module)}(?: |$)", makefile, re.MULTILINE)
            assert run or path.name in RUN_BY_OTHERS, f"no target of make runs {module}"


def test_the_readme_lists_exactly_the_commands_that_there_are(mistralc: Command) -> None:
    table = text_of(README)
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
        for line in re.findall(r"mistralc ([a-z]+ [^\n`|]*)", text_of(document)):
            name, *words = line.split()
            if name in commands:
                for option in re.findall(r"--[a-z][a-z-]+", " ".join(words)):
                    assert option in helps[name], f"{document.name}: {name} has no {option}"


def test_links_in_the_documents_lead_somewhere() -> None:
    for document in DOCUMENTS:
        links = re.findall(r"\]\(([^):]+)\)|<img src=\"([^\":]+)\"", text_of(document))
        for target, _, heading in (one.partition("#") for pair in links for one in pair if one):
            path = document.parent / target if target else document
            assert path.exists(), f"{document.name} links to {target}"
            if heading:
                headings = re.findall(r"^#+ (.+)$", text_of(path), re.MULTILINE)
                anchors = [
                    re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings
                ]
                assert heading in anchors, f"{document.name} links to #{heading} of {path.name}"


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
    places |= dict.fromkeys(("CHECKPOINT", *CHECKPOINTS), plain_checkpoint)
    places["FILE"].write_text("It was a bright cold day in April. " * 60, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for command, _ in block_commands(text_of(document)):
        check(command)
        given = shlex.split(command)
        if given[0] in FOREIGN or command.startswith(tuple(CANNOT_RUN)):
            continue
        assert given[0] == "mistralc", f"{command}: run it here, or say in CANNOT_RUN why not"
        for name in {"BUNDLE", "OTHER"} & {*given}:
            if "export" not in given and not places[name].exists():
                shutil.copytree(sliding_bundle, places[name])
        words = [str(places.get(word, word)) for word in given]
        ended = mistralc(*words[1:], stdin=b"")
        assert ended.code == 0, f"`{command}` of {document.name} failed: {ended.err}{ended.out}"


def test_what_cannot_be_run_is_still_in_a_document() -> None:
    commands = [command for each in DOCUMENTS for command, _ in block_commands(text_of(each))]
    for beginning in CANNOT_RUN:
        assert any(command.startswith(beginning) for command in commands), beginning
    programs = {shlex.split(command)[0] for command in commands}
    assert programs >= FOREIGN.keys(), "no document has these commands any more"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_the_sentences_of_documents_exist_with_their_options(document: Path) -> None:
    for command in inline_commands(
        text_of(document), ("mistralc", "python", "make", "pip", *TOOLS)
    ):
        check(command, whole=False)


def test_the_documents_name_the_commands_that_make_their_figures() -> None:
    found = [c for each in DOCUMENTS for c in inline_commands(text_of(each), ("python -m",))]
    assert len({c.split()[2] for c in found}) >= 10, "commands that make figures were lost"


def test_a_command_that_does_not_exist_is_found() -> None:
    wrong = (
        "mistralc exprot CHECKPOINT", "mistralc export CHECKPOINT --windw 5",
        "mistralc export CHECKPOINT --window five", "python run.pyz export .", "make exprot",
        "make export CHEKPOINT=smollm2", "python -m benchmarks.flat BUNDLE --stps 3",
        "python -m benchmarks.round BUNDLE", "pip install '.[gpu]'", "pip install numpi",
        "python benchmarks/flat.py BUNDLE", "pytest tests/test_nothing.py",
    )  # fmt: skip
    for command in wrong:
        with pytest.raises(AssertionError, match=re.escape(command)):
            check(command)


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS.keys())
def test_what_follows_from_the_code_is_in_the_documents_as_it_is_now(part: Part) -> None:
    assert between(part.document, *part.marks) == part.write(), "run `make docs`"


def test_code_named_in_the_documents_is_where_they_say() -> None:
    """`NAME` (`package/file.py`) is defined or imported there; every file named exists."""
    pairs = 0
    tests = "\n".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")
    )
    for document in DOCUMENTS:
        text = text_of(document)
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


def test_the_architecture_lists_the_folders_in_the_order_of_their_imports() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    text = text_of(ROOT / "docs" / "architecture.md")
    for contract in project["tool"]["importlinter"]["contracts"]:
        package, _, order = contract["name"].partition(", ")
        if order == "from the command line down":
            rows = re.findall(rf"^\| (`{package}/.+?`) \| ", text, re.MULTILINE)
            listed = [row.replace("`", "").replace(", ", " | ") for row in rows]
            listed = [row.replace(".py", "").replace("/ ", " ").rstrip("/") for row in listed]
            assert [row.replace("/", ".") for row in listed] == contract["layers"]


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
