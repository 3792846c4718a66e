"""A real bundle of a tiny model, exported once per process."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from exporter.export import ExportOptions, export
from tests.support.make_checkpoint import tiny_spec, write_checkpoint

CONTEXT = 96  # tokens: a prompt of 100 letters does not fit


def tiny_bundle() -> Path:
    """One layer has a window of 8 tokens, the other attends to all `CONTEXT`. Read-only."""
    return Path(_folder().name) / "bundle"


@cache
def _folder() -> "TemporaryDirectory[str]":
    folder = TemporaryDirectory()  # deleted when the process exits
    checkpoint = write_checkpoint(Path(folder.name) / "tiny", tiny_spec(layer_windows=(8, None)))
    options = ExportOptions(context=CONTEXT, chunk=8)
    export(str(checkpoint), Path(folder.name) / "bundle", options)
    return folder
