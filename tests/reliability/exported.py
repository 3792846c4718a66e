"""A real bundle of a tiny model, exported once a process. Knows nothing about who opens it."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from exporter.export import ExportOptions, export
from tests.support.make_checkpoint import tiny_spec, write_checkpoint

CONTEXT = 96  # tokens: a prompt of a hundred letters does not fit


def bundle() -> Path:
    """One layer slides over 8 tokens, the other sees all `CONTEXT`. Do not change it."""
    return Path(_folder().name) / "bundle"


@cache
def _folder() -> "TemporaryDirectory[str]":
    folder = TemporaryDirectory()  # it goes with the process
    checkpoint = write_checkpoint(Path(folder.name) / "tiny", tiny_spec(layer_windows=(8, None)))
    options = ExportOptions(context=CONTEXT, chunk=8)
    export(str(checkpoint), Path(folder.name) / "bundle", options)
    return folder
