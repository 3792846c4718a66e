"""The command `serve`. Knows only the command line; the server is imported when it runs."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from graphs.errors import MistralcError
from runtime.cli import options
from runtime.serve.settings import KEYS_VARIABLE, PREFIX_BYTES, Limits, Settings, read_api_keys

_LIMITS = "Limits"
LIMITS = Limits()


def serve(
    *,
    bundle: options.BundlePath,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any that is free.")] = 8000,
    rows: Annotated[int, typer.Option(min=1, help="Requests that run side by side.")] = 8,
    model: Annotated[
        str | None,
        typer.Option("--model-name", help="Name in the API; the directory's if left out."),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help=f"Keys to let in, one a line; also in ${KEYS_VARIABLE}."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of a choice.", rich_help_panel=_LIMITS)
    ] = LIMITS.max_new_tokens,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of a prompt.", rich_help_panel=_LIMITS)
    ] = None,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Most that wait for a row.", rich_help_panel=_LIMITS)
    ] = LIMITS.max_waiting,
    max_body_bytes: Annotated[
        int, typer.Option(min=1, help="Largest request.", rich_help_panel=_LIMITS)
    ] = LIMITS.max_body_bytes,
    timeout_seconds: Annotated[
        float, typer.Option(min=0.1, help="Longest request.", rich_help_panel=_LIMITS)
    ] = LIMITS.timeout_s,
    read_seconds: Annotated[
        float, typer.Option(min=0.1, help="Longest wait for a body.", rich_help_panel=_LIMITS)
    ] = LIMITS.read_s,
    stall_seconds: Annotated[
        float,
        typer.Option(min=0.1, help="Longest wait for a client to act.", rich_help_panel=_LIMITS),
    ] = LIMITS.stall_s,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="Time to finish after SIGTERM.", rich_help_panel=_LIMITS)
    ] = LIMITS.drain_s,
    prefix_bytes: Annotated[
        int, typer.Option(min=0, help="Memory for prompts that begin alike.")
    ] = PREFIX_BYTES,
    threads: options.Threads = None,
    no_check: options.NoCheck = False,
    require_signature: options.RequireSignature = None,
    as_json: options.Json = False,
) -> None:
    """Serve a bundle over HTTP, as OpenAI's API does, with a page to try it and metrics."""
    keys = read_api_keys(api_key_file)
    try:
        from runtime.serve.server import listen
        from runtime.serve.server import serve as run
    except ModuleNotFoundError as error:
        raise MistralcError(
            f"Serving needs {error.name}, which is not installed here. Install it: "
            "pip install 'mistralc[serve]'."
        ) from error
    settings = Settings(
        bundle=bundle,
        model=model or bundle.resolve().name,
        rows=rows,
        threads=threads,
        prefix_bytes=prefix_bytes,
        check=not no_check,
        require_signature=require_signature,
        api_keys=keys,
        limits=Limits(
            max_body_bytes=max_body_bytes,
            max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=max_new_tokens,
            max_waiting=max_waiting,
            timeout_s=timeout_seconds,
            read_s=read_seconds,
            stall_s=stall_seconds,
            drain_s=drain_seconds,
        ),
    )
    listening = listen(host, port)
    if not keys and host not in ("127.0.0.1", "::1", "localhost"):
        print(
            "mistralc: everyone who reaches this address is let in; --api-key-file asks for keys.",
            file=sys.stderr,
        )

    def say(event: str, url: str) -> None:
        if as_json:
            print(json.dumps({"event": event, "url": url, "model": settings.model}), flush=True)
        else:
            print(f"mistralc: {event}, {settings.model} at {url}", file=sys.stderr, flush=True)

    run(settings, listening, say)
