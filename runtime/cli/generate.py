"""The command generate: one prompt, one completion. Knows only the command line.

Heavy imports are inside the functions, so that `mistralc --help` answers at once.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphs.errors import MistralcError, UsageError
from runtime.cli import options
from runtime.decoding.sampling_defaults import sampling_params
from runtime.system.progress import stage_for

if TYPE_CHECKING:
    from runtime.load import Loaded


def generate(
    *,
    bundle: options.BundlePath,
    prompt: Annotated[
        str | None,
        typer.Argument(help="The prompt (default, or `-`: read it from standard input)."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Read the prompt from this file.")
    ] = None,
    as_chat: Annotated[
        bool, typer.Option("--chat", help="Answer the prompt as a user's message in a chat.")
    ] = False,
    system: options.SystemMessage = None,
    stream: Annotated[bool, typer.Option(help="Print text while it is generated.")] = True,
    limit_options: options.LimitOptions,
    sampling: options.GenerateSamplingOptions,
    session: options.SessionFile = None,
    loading: options.LoadOptions,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Continue a prompt, or answer it with --chat."""
    from runtime.cli.session_file import resume, save
    from runtime.completion import Completion

    if system is not None and not as_chat:
        raise UsageError("--system belongs to a chat; add --chat, or put its text into the prompt.")
    if sampling.logprobs is not None and not as_json:
        raise UsageError("--logprobs are reported as JSON; add --json.")
    limits = limit_options.limits()
    text = _read_prompt(prompt, file)
    stage = stage_for(quiet=quiet or as_json)
    loaded = loading.load(bundle, stage)
    params = sampling_params(loaded.defaults, sampling.given)
    note = {} if session is None else resume(session, loaded)
    ids = _encode(loaded, text, system, as_chat=as_chat)
    completion = Completion(loaded.generator, loaded.tokenizer, ids, params, limits, chat=as_chat)
    with stage("Reading the prompt", len(ids)) as advance:
        completion.prefill(advance)
    for piece in completion:
        if stream and not as_json:
            print(piece, end="", flush=True)
    if session is not None:
        save(session, loaded, note)
    if as_json:
        load_s = {"load_s": loaded.seconds}
        result = completion.to_json()
        print(json.dumps(result | {"timings": load_s | result["timings"]}, ensure_ascii=False))
    else:
        print("" if stream else completion.text)


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    """Return the prompt from the argument, the file or standard input.

    Raises UsageError if it is empty or given twice, MistralcError if it cannot be read as UTF-8.
    """
    if prompt not in (None, "-") and file is not None:
        raise UsageError("A prompt and --file were both given; give one of them.")
    try:
        if file is not None:
            text = file.read_text(encoding="utf-8")
        elif prompt in (None, "-"):
            if sys.stdin.isatty():
                typer.echo("Type the prompt; end with Ctrl-D.", err=True)
            text = sys.stdin.buffer.read().decode("utf-8")
        else:
            text = str(prompt)
    except UnicodeDecodeError as error:
        source = file or "standard input"
        raise MistralcError(
            f"The prompt from {source} is not UTF-8 (byte {error.start} is 0x"
            f"{error.object[error.start]:02x}). Convert it first, for example with iconv."
        ) from error
    except OSError as error:
        raise MistralcError(
            f"The prompt could not be read: {error}. Check the path given with --file."
        ) from error
    if not text:
        raise UsageError("The prompt is empty; give at least one character of text.")
    return text


def _encode(loaded: "Loaded", text: str, system: str | None, *, as_chat: bool) -> list[int]:
    if not as_chat:
        return loaded.tokenizer.encode(text)
    messages = [{"role": "system", "content": system}] if system is not None else []
    return loaded.tokenizer.encode_chat([*messages, {"role": "user", "content": text}])
