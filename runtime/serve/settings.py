"""What a server is told when it starts. Knows nothing about requests or HTTP."""

import os
from dataclasses import dataclass
from pathlib import Path

from graphs.errors import UsageError

PREFIX_BYTES = 1 << 29  # of prompts that are kept for those that begin alike
KEYS_VARIABLE = "MISTRALC_API_KEYS"  # keys separated by white space


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much one client may ask of the others. Seconds, bytes, tokens."""

    max_body_bytes: int = 1 << 20
    max_prompt_tokens: int | None = None  # None: what the ring holds
    max_new_tokens: int = 4096
    max_waiting: int = 256
    timeout_s: float = 600.0  # from a request's first byte to its last
    read_s: float = 30.0  # for a request's body to arrive
    stall_s: float = 30.0  # for a client to take what waits for it, or to begin its request
    drain_s: float = 30.0  # that running requests get after SIGTERM
    buffered_tokens: int = 1024  # of one choice that wait for a client


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One bundle, one server. Without `api_keys` everyone is let in."""

    bundle: Path
    model: str
    rows: int = 8
    threads: int | None = None
    prefix_bytes: int = PREFIX_BYTES
    check: bool = True
    require_signature: Path | None = None
    api_keys: tuple[str, ...] = ()
    limits: Limits = Limits()


def read_api_keys(path: Path | None) -> tuple[str, ...]:
    """Keys in a file, one a line (`#` begins a comment), or in the environment; () for none.

    Raises UsageError where a file holds none: that would let everyone in.
    """
    if path is None:
        return tuple(os.environ.get(KEYS_VARIABLE, "").split())
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"The keys in {path} could not be read ({error}). Check the path given with "
            "--api-key-file."
        ) from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys or any(len(key.split()) > 1 for key in keys):
        raise UsageError(
            f"{path} has no API key, or one with a blank inside; one key a line is expected. "
            "Leave --api-key-file out to let everyone in."
        )
    return keys
