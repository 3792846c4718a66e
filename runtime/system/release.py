"""The version of mistralc, whether it is installed or run from its source tree."""

import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

SOURCE_TREE = Path(__file__).resolve().parents[2]


def mistralc_version() -> str:
    """The installed version; in a source tree that is not installed, that of pyproject.toml."""
    try:
        return version("mistralc")
    except PackageNotFoundError:
        text = (SOURCE_TREE / "pyproject.toml").read_text(encoding="utf-8")
        declared: str = tomllib.loads(text)["project"]["version"]
        return declared
