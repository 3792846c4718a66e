"""The result of one check, as a value. Knows nothing about what is checked."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """The result of one check. `remedy` is the command to run or what to do; None if it is ok."""

    name: str
    state: State
    found: str
    remedy: str | None = None


def ok(name: str, found: str) -> Check:
    """Report that all is well, or a fact for information."""
    return Check(name=name, state="ok", found=found)


def warning(name: str, found: str, remedy: str) -> Check:
    """Report something that may make mistralc slower, or stop some of it from working."""
    return Check(name=name, state="warning", found=found, remedy=remedy)


def failed(name: str, found: str, remedy: str) -> Check:
    """Report something that will not work."""
    return Check(name=name, state="failed", found=found, remedy=remedy)
