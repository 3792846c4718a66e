"""Locate the user's cache directory. Knows nothing about its contents."""

import os
from contextlib import suppress
from pathlib import Path


def cache_directory() -> Path | None:
    """Return the directory for files that may be deleted at any time; it need not exist yet.

    `$XDG_CACHE_HOME/mistralc`, or `~/.cache/mistralc` if the variable is not set. None for a user
    without a home directory, as in many containers.
    """
    home = os.environ.get("XDG_CACHE_HOME")
    with suppress(RuntimeError):
        home = home or str(Path.home() / ".cache")
    return Path(home) / "mistralc" if home else None
