"""Save and restore a sequence between runs (--session). Knows no command.

The tokens in the file are not computed again; the rest of the next prompt is fed as usual.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graphs.errors import UsageError
from runtime.decoding import snapshot
from runtime.load import Loaded


def resume(path: Path, loaded: Loaded) -> Mapping[str, Any]:
    """Restore the sequence in `path` if the file exists; return the note saved with it, or {}.

    Raises MistralcError, and changes nothing, if the file is damaged or of another bundle;
    UsageError if the file does not exist and its directory does not either.
    """
    if not path.exists():
        if not path.absolute().parent.is_dir():
            raise UsageError(
                f"--session is {path}; expected a file in a directory that exists. Make the "
                "directory first."
            )
        return {}
    generator, manifest = loaded.generator, loaded.bundle.manifest
    found = snapshot.load(path, manifest)
    snapshot.restore(found, generator.session, generator.ring, manifest)
    generator.tokens = found.tokens
    return found.note


def save(path: Path, loaded: Loaded, note: Mapping[str, Any]) -> None:
    """Write the sequence in the ring, and `note`, to `path`, replacing an existing file."""
    generator = loaded.generator
    generator.drop_interrupted()
    taken = snapshot.take(
        generator.session, generator.ring, generator.tokens, loaded.bundle.manifest, note=note
    )
    snapshot.save(taken, path)
