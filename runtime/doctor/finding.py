"""One finding about a host or a bundle, as a value. Knows nothing about what is checked."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What was found. `remedy` is the command to run, or the one thing to do, unless it is ok."""

    name: str
    state: State
    found: str
    remedy: str | None = None


def ok(name: str, found: str) -> Check:
    """As it should be, or only for information."""
    return Check(name=name, state="ok", found=found)


def warning(name: str, found: str, remedy: str) -> Check:
    """It may work, slower or not for everything."""
    return Check(name=name, state="warning", found=found, remedy=remedy)


def failed(name: str, found: str, remedy: str) -> Check:
    """It will not work."""
    return Check(name=name, state="failed", found=found, remedy=remedy)
