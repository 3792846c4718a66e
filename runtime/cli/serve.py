"""The command serve. Knows only the command line; the server is imported when it runs."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from graphs.errors import MistralcError
from runtime.cli import options
from runtime.serve.settings import (
    DEFAULT_ROWS,
    KEYS_VARIABLE,
    PREFIX_BYTES,
    Limits,
    Settings,
    read_api_keys,
)

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    *,
    bundle: options.BundlePath,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = LOOPBACK[0],
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 chooses a free one.")
    ] = 8000,
    rows: Annotated[
        int, typer.Option(min=1, help="Most requests decoded at the same time.")
    ] = DEFAULT_ROWS,
    model: Annotated[
        str | None,
        typer.Option("--model-name", help="The model's name in the API (default: the bundle's "
                     "directory)."),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help=f"API keys to accept, one a line (default: those in ${KEYS_VARIABLE})."),
    ] = None,
    limits: Limits,
    prefix_bytes: Annotated[
        int, typer.Option(min=0, help="Memory for the cache of shared prompt prefixes.")
    ] = PREFIX_BYTES,
    loading: options.LoadOptions,
    as_json: options.Json = False,
) -> None:  # fmt: skip
    """Serve a bundle over HTTP with OpenAI's API, a test page and metrics."""
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
        threads=loading.threads,
        prefix_bytes=prefix_bytes,
        check=not loading.no_check,
        require_signature=loading.require_signature,
        api_keys=keys,
        limits=limits,
    )
    listening = listen(host, port)
    if not keys and host not in LOOPBACK:
        print(
            "mistralc: every client that reaches this address is accepted; --api-key-file "
            "requires keys.",
            file=sys.stderr,
        )

    run(settings, listening, partial(_report, settings.model, as_json=as_json))


def _report(model: str, event: str, url: str, *, as_json: bool) -> None:
    """Print what the server is doing: an event such as "ready", and its URL."""
    if as_json:
        print(json.dumps({"event": event, "url": url, "model": model}), flush=True)
    else:
        print(f"mistralc: {event}, {model} at {url}", file=sys.stderr, flush=True)
