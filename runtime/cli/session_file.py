"""A text that goes on where it stopped: a generator's snapshot in a file. Knows no command.

What the file holds of the next prompt is not computed again; what it does not is read as always.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graphs.errors import UsageError
from runtime.decoding import snapshot
from runtime.load import Loaded


def resume(path: Path, loaded: Loaded) -> Mapping[str, Any]:
    """Bring the text in `path` back, if the file exists; returns the note that came with it.

    Raises MistralcError, and leaves everything as it is, for a file that is damaged or foreign,
    UsageError where the file does not exist and could not be written either.
    """
    if not path.exists():
        if not path.absolute().parent.is_dir():
            raise UsageError(
                f"--session is {path}; a file in a directory that exists is expected. Make the "
                "directory first."
            )
        return {}
    generator, manifest = loaded.generator, loaded.bundle.manifest
    found = snapshot.load(path, manifest)
    snapshot.restore(found, generator.session, generator.ring, manifest)
    generator.tokens = found.tokens
    return found.note


def keep(path: Path, loaded: Loaded, note: Mapping[str, Any]) -> None:
    """Put the text that the ring holds into `path`, in place of what was there."""
    generator = loaded.generator
    generator.drop_interrupted()
    taken = snapshot.take(
        generator.session, generator.ring, generator.tokens, loaded.bundle.manifest, note=note
    )
    snapshot.save(taken, path)
