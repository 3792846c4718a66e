"""Write the parts of documents that follow from the code: `make docs`.

    python -m tests.support.documents.generate

Each lies between two marks. `tests/test_readme.py` fails if one is not what this would write.
"""

import contextlib
import io
import json
import os
import re
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from exporter.families.catalogue import FAMILIES
from exporter.families.family import Family
from graphs.precisions import PRECISIONS, Precision
from graphs.targets import TARGETS, Target
from tests.support.documents import DOCS, README, ROOT, between, replace_between
from tests.support.make_checkpoint import PRESETS, hf_config

PLANS = {
    "gpus": ("plan", "Mistral-7B-v0.1"),
    "cpu": ("plan", "Mistral-7B-v0.1", "--target", "cpu", "--precision", "int4wo"),
}
"""Commands whose output is shown. The directory has the config.json of Mistral-7B-v0.1 only."""


PEERS_MARKS = "<!-- measured by benchmarks/peers/compare.py -->", "<!-- end of the peers -->"
PEERS = {
    "mistralc int4wo-gptq-128": "mistralc, 4 bits (GPTQ)",
    "onnxruntime-genai int4": "ONNX Runtime GenAI, 4 bits",
    "llama.cpp Q4_0": "llama.cpp, 4 bits (Q4_0)",
    "OpenVINO GenAI, from Q4_0": "OpenVINO GenAI, 4 bits (from Q4_0)",
    "mistralc int4wo-exact": "mistralc, 4 bits, the blocks of the Q4_1 file",
    "llama.cpp Q4_1": "llama.cpp, 4 bits, the Q4_1 file itself",
    "mistralc int8-smoothquant": "mistralc, 8 bits (weights and activations)",
    "mistralc int8wo-awq-gptq-128": "mistralc, 8 bits (weights)",
    "onnxruntime-genai int8": "ONNX Runtime GenAI, 8 bits",
    "llama.cpp Q8_0": "llama.cpp, 8 bits (Q8_0)",
    "OpenVINO GenAI, from Q8_0": "OpenVINO GenAI, 8 bits (from Q8_0)",
}
"""Rows of the table in docs/benchmarks.md that README shows, and what they are called there."""


class Part(NamedTuple):
    """A part of a document, and what writes it."""

    document: Path
    name: str
    write: Callable[[], str]

    @property
    def marks(self) -> tuple[str, str]:
        """The lines before and after the part."""
        return f"<!-- {self.name}: written by make docs -->", f"<!-- end of {self.name} -->"


def precisions_by_target() -> str:
    """A row for each precision and a column for each target: what the graph computes in."""
    heads = [f"`{one.name}`<br>{one.title}" for one in TARGETS.values()]
    rows = [
        [f"`{one.name}`", _stored(one)]
        + [target.activations.get(one.name, "") for target in TARGETS.values()]
        for one in PRECISIONS.values()
    ]
    return _table(["`--precision`", "what it is", *heads], rows)


def _stored(precision: Precision) -> str:
    if precision.min_compute_capability is None:
        return precision.summary
    least = ".".join(map(str, precision.min_compute_capability))
    return f"{precision.summary}; GPUs from compute capability {least}"


def families() -> str:
    """A row for each family: its models, what it adds, its names in files, and its targets."""
    rows = [
        [one.title, one.adds, ", ".join(f"`{name}`" for name in one.architectures),
         ", ".join(f"`{name}`" for name in one.gguf_names), _targets_of(one)]
        for one in FAMILIES
    ]  # fmt: skip
    return _table(["models", "beside what Llama has", "architecture", "in GGUF", "targets"], rows)


def _targets_of(family: Family) -> str:
    able = [n for n, one in TARGETS.items() if all(getattr(one, fact) for fact in family.needs)]
    return "all" if len(able) == len(TARGETS) else ", ".join(f"`{name}`" for name in able)


def facts_of_targets() -> str:
    """A row for each target: what runs it, on which GPUs, and what the bundle holds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    packages = {
        extra: ", ".join(f"`{one.partition('>=')[0]}`" for one in needed)
        for extra, needed in project["optional-dependencies"].items()
    }
    rows = [
        [f"`{one.name}`", one.title, _hardware(one), packages[one.name],
         "a compiled plan" if one.holds_plan else "a graph and its weights",
         "at export" if one.verified_at_export else "on a host with the GPU"]
        for one in TARGETS.values()
    ]  # fmt: skip
    heads = ["`--target`", "runs on", "hardware", "packages", "the bundle holds", "is verified"]
    return _table(heads, rows)


def _hardware(target: Target) -> str:
    if not target.on_gpu:
        return "CPU"
    if target.compute_capabilities is None:
        return "NVIDIA GPU"
    return f"NVIDIA GPU of compute capability {', '.join(target.compute_capabilities)}"


def peers() -> str:
    """A row for each engine of `PEERS`, from the table that the benchmark writes."""
    measured = between(DOCS / "benchmarks.md", *PEERS_MARKS)
    found = {
        row[0]: row for row in (_cells(line) for line in measured.splitlines()) if len(row) == 6
    }
    rows = [[label, *found[name][1:4]] for name, label in PEERS.items()]
    heads = ["", "decode, tokens/s", "prefill, tokens/s", "perplexity"]
    return _table(heads, rows, align="---:")


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def _table(heads: list[str], rows: list[list[str]], align: str = "---") -> str:
    lines = [heads, ["---", *[align] * (len(heads) - 1)], *rows]
    return "\n".join(re.sub(r"  +", " ", f"| {' | '.join(line)} |") for line in lines)


def printed(*arguments: str) -> str:
    """What `mistralc` prints in a directory that has Mistral-7B-v0.1's config.json."""
    import mistralc

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("Mistral-7B-v0.1").mkdir()
        config = hf_config(PRESETS["mistral-7b-v0.1"], "bfloat16")
        (Path("Mistral-7B-v0.1") / "config.json").write_text(json.dumps(config), encoding="utf-8")
        out = io.StringIO()
        with contextlib.redirect_stdout(out), _arguments("mistralc", *arguments):
            mistralc.main()
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


@contextlib.contextmanager
def _arguments(*words: str) -> Iterator[None]:
    before = sys.argv, os.environ.get("COLUMNS")
    sys.argv, os.environ["COLUMNS"] = [*words], "120"
    try:
        with contextlib.suppress(SystemExit):
            yield
    finally:
        sys.argv = before[0]
        if before[1] is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before[1]


def _session(arguments: tuple[str, ...]) -> str:
    command = " ".join(("$ mistralc", *arguments))
    return f"```console\n{command}\n{printed(*arguments)}\n```"


PARTS: Mapping[str, Part] = {
    one.name: one
    for one in (
        Part(README, "families", families),
        Part(README, "precisions by target", precisions_by_target),
        Part(README, "targets", facts_of_targets),
        Part(README, "peers", peers),
        Part(DOCS / "planning.md", "plan for GPUs", lambda: _session(PLANS["gpus"])),
        Part(DOCS / "planning.md", "plan for a CPU", lambda: _session(PLANS["cpu"])),
    )
}


def main() -> None:
    """Write all parts."""
    for part in PARTS.values():
        replace_between(part.document, *part.marks, part.write())
        print(f"{part.document.name}: {part.name}")


if __name__ == "__main__":
    main()
