"""Write the parts of documents that follow from the code: `make docs`.

    python -m tests.support.write_documents

Each lies between two marks. `tests/test_readme.py` fails if one is not what this would write.
"""

import contextlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from graphs.precisions import PRECISIONS, Precision
from graphs.targets import TARGETS, Target
from tests.support.documents import DOCS, README, replace_between
from tests.support.make_checkpoint import PRESETS, hf_config

PLANS = {
    "gpus": ("plan", "Mistral-7B-v0.1"),
    "cpu": ("plan", "Mistral-7B-v0.1", "--target", "cpu", "--precision", "int4wo"),
}
"""Commands whose output is shown. The directory has the config.json of Mistral-7B-v0.1 only."""


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
    return _table(["`--precision`", "weights are stored as", *heads], rows)


def _stored(precision: Precision) -> str:
    if precision.min_compute_capability is None:
        return precision.summary
    least = ".".join(map(str, precision.min_compute_capability))
    return f"{precision.summary}; GPUs from compute capability {least}"


def facts_of_targets() -> str:
    """A row for each target: what runs it, on which GPUs, and what the bundle holds."""
    rows = [
        [f"`{one.name}`", one.title, _hardware(one), f"`{one.distributions[0]}`",
         "a compiled plan" if one.holds_plan else "a graph and its weights",
         "at export" if one.verified_at_export else "on a host with the GPU"]
        for one in TARGETS.values()
    ]  # fmt: skip
    heads = ["`--target`", "runs on", "hardware", "package", "the bundle holds", "is verified"]
    return _table(heads, rows)


def _hardware(target: Target) -> str:
    if not target.on_gpu:
        return "CPU"
    if target.compute_capabilities is None:
        return "NVIDIA GPU"
    return f"NVIDIA GPU of compute capability {', '.join(target.compute_capabilities)}"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
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
        Part(README, "precisions by target", precisions_by_target),
        Part(README, "targets", facts_of_targets),
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
