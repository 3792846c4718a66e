"""The settings that a server starts with. Knows nothing about requests or HTTP."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from graphs.errors import UsageError
from runtime.scheduling.prefix_cache import PREFIX_BYTES as PREFIX_BYTES  # for the command line

KEYS_VARIABLE = "MISTRALC_API_KEYS"  # keys, separated by white space
DEFAULT_ROWS = 8  # requests decoded at the same time

_LIMITS = "Limits"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one client may use of a shared server; times are in seconds.

    A field annotated with `typer.Option` is an option of the command serve.
    """

    max_new_tokens: Annotated[
        int, typer.Option(min=1, rich_help_panel=_LIMITS, help="Most tokens of an answer.")
    ] = 4096
    max_prompt_tokens: Annotated[
        int | None,
        typer.Option(min=1, rich_help_panel=_LIMITS,
                     help="Most tokens of a prompt (default: what the ring holds)."),
    ] = None  # fmt: skip
    max_waiting: Annotated[
        int,
        typer.Option(min=1, rich_help_panel=_LIMITS, help="Most requests waiting for a row."),
    ] = 256
    max_body_bytes: Annotated[
        int,
        typer.Option(min=1, rich_help_panel=_LIMITS, help="Largest body of a request, in bytes."),
    ] = 1 << 20
    timeout_s: Annotated[
        float,
        typer.Option("--timeout-seconds", min=0.1, rich_help_panel=_LIMITS,
                     help="Longest time for a request, waiting for a row included."),
    ] = 600.0  # fmt: skip
    read_s: Annotated[
        float,
        typer.Option("--read-seconds", min=0.1, rich_help_panel=_LIMITS,
                     help="Longest time for the body of a request to arrive."),
    ] = 30.0  # fmt: skip
    stall_s: Annotated[
        float,
        typer.Option("--stall-seconds", min=0.1, rich_help_panel=_LIMITS,
                     help="Longest time for a client to read what was sent, or to send a "
                     "request's head."),
    ] = 30.0  # fmt: skip
    drain_s: Annotated[
        float,
        typer.Option("--drain-seconds", min=0, rich_help_panel=_LIMITS,
                     help="Longest time for running requests to finish after SIGTERM."),
    ] = 30.0  # fmt: skip
    buffered_tokens: int = 1024  # of one choice, waiting for the client to read them


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A server of one bundle. Without `api_keys` it accepts every client."""

    bundle: Path
    model: str
    rows: int = DEFAULT_ROWS
    threads: int | None = None
    prefix_bytes: int = PREFIX_BYTES
    check: bool = True
    require_signature: Path | None = None
    api_keys: tuple[str, ...] = ()
    limits: Limits = Limits()


def read_api_keys(path: Path | None) -> tuple[str, ...]:
    """Read API keys from a file, one a line (`#` begins a comment), or from the environment.

    Returns () if there is no file and the variable is not set. Raises UsageError if the file has no
    key, because the server would then accept every client.
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
            f"{path} has no API key, or a key with a blank inside; one key a line is expected. "
            "Leave --api-key-file out to accept every client."
        )
    return keys
