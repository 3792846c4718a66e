"""Find models that were downloaded into the Hugging Face hub's cache. Downloads nothing.

The layout is that of huggingface_hub ("Understand caching"): `models--ORG--NAME/refs/main` holds a
revision, and `snapshots/REVISION` the files.
"""

import os
import re
from pathlib import Path

from graphs.errors import MistralcError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PREFIX = "models--"


def looks_like_hub_id(source: str) -> bool:
    """Whether a name has the form ORGANIZATION/MODEL and is no path that begins with a dot."""
    return _HUB_ID.fullmatch(source) is not None and not source.startswith(".")


def is_repository(path: Path) -> bool:
    """Whether a directory is a model's root in the cache."""
    return (path / "snapshots").is_dir()


def cached(hub_id: str) -> Path | None:
    """The snapshot of a model that was downloaded; None if there is none."""
    path = _cache() / (_PREFIX + hub_id.replace("/", "--"))
    return snapshot(path) if is_repository(path) else None


def snapshot(repository: Path) -> Path:
    """The snapshot that `main` names, or the only one. Raises MistralcError if that is unclear."""
    found = sorted(one for one in (repository / "snapshots").iterdir() if one.is_dir())
    main = repository / "refs" / "main"
    if main.is_file():
        named = repository / "snapshots" / main.read_text(encoding="utf-8").strip()
        if named.is_dir():
            return named
    if len(found) == 1:
        return found[0]
    listed = ", ".join(str(one) for one in found[:5]) or "none"
    raise MistralcError(
        f"{repository} is a model in the hub's cache with {len(found)} snapshots and none that "
        f"refs/main names; expected one. Give the directory of one: {listed}."
    )


def name_of(repository: Path) -> str:
    """The model's name on the hub, if the directory is named as the cache names it."""
    if not repository.name.startswith(_PREFIX):
        return str(repository)
    return repository.name.removeprefix(_PREFIX).replace("--", "/", 1)


def _cache() -> Path:
    """Where huggingface_hub keeps its files, by the same environment variables."""
    if "HF_HUB_CACHE" in os.environ:
        return Path(os.environ["HF_HUB_CACHE"]).expanduser()
    home = os.environ.get("HF_HOME")
    if home is None:
        home = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")  # noqa: PTH118
    return Path(home).expanduser() / "hub"
