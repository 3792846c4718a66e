"""The commands of a production host: generate, chat, bench and more. Knows only the command line.

Heavy imports stand inside the commands, so that `mistralc --help` answers at once.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphs.errors import MistralcError, UsageError
from runtime.cli import options
from runtime.cli.diff import diff
from runtime.cli.doctor import doctor
from runtime.cli.serve import serve
from runtime.cli.sign import keygen, sign
from runtime.decoding.sampling_defaults import sampling_params
from runtime.system.progress import stage_for

if TYPE_CHECKING:
    from runtime.load import Loaded

DEFAULT_NEW_TOKENS = 512  # an answer of a model that never stops has to end somewhere


def register(app: typer.Typer) -> None:
    """Add this package's commands to `app`."""
    app.command()(generate)
    app.command()(chat)
    app.command()(inspect)
    app.command()(bench)
    app.command()(doctor)
    app.command()(diff)
    app.command()(keygen)
    app.command()(sign)
    app.command()(serve)


def generate(
    *,
    bundle: options.BundlePath,
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; `-` or nothing reads standard input.")
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the prompt here.")] = None,
    as_chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's message, not text to continue.")
    ] = False,
    system: options.System = None,
    stream: Annotated[bool, typer.Option(help="Print text as it comes.")] = True,
    max_new_tokens: options.MaxNewTokens = DEFAULT_NEW_TOKENS,
    stop: options.Stop = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    seed: options.Seed = None,
    logit_bias: options.LogitBias = None,
    logprobs: options.LogProbs = None,
    speculate: options.Speculate = 0,
    session: options.SessionFile = None,
    threads: options.Threads = None,
    no_check: options.NoCheck = False,
    require_signature: options.RequireSignature = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Continue a prompt, or answer it with --chat."""
    from runtime.cli.session_file import keep, resume
    from runtime.completion import Completion, Limits
    from runtime.load import load

    if system is not None and not as_chat:
        raise UsageError("--system belongs to a chat; add --chat, or put it into the prompt.")
    if logprobs is not None and not as_json:
        raise UsageError("--logprobs are reported as JSON; add --json.")
    given = options.chosen(
        logit_bias,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty, seed=seed, logprobs=logprobs,
    )  # fmt: skip
    limits = Limits(max_new_tokens=max_new_tokens, stop=tuple(stop or ()), speculate=speculate)
    text = _prompt(prompt, file)
    stage = stage_for(quiet=quiet or as_json)
    loaded = load(
        bundle, threads=threads, check=not no_check, require_signature=require_signature,
        stage=stage,
    )  # fmt: skip
    params = sampling_params(loaded.defaults, given)
    note = {} if session is None else resume(session, loaded)
    ids = _encode(loaded, text, system, as_chat=as_chat)
    completion = Completion(loaded.generator, loaded.tokenizer, ids, params, limits, chat=as_chat)
    with stage("Reading the prompt", len(ids)) as advance:
        completion.prefill(advance)
    for piece in completion:
        if stream and not as_json:
            print(piece, end="", flush=True)
    if session is not None:
        keep(session, loaded, note)
    if as_json:
        load_s = {"load_s": loaded.seconds}
        result = completion.to_json()
        print(json.dumps(result | {"timings": load_s | result["timings"]}, ensure_ascii=False))
    else:
        print("" if stream else completion.text)


def chat(
    *,
    bundle: options.BundlePath,
    system: options.System = None,
    max_new_tokens: options.MaxNewTokens = DEFAULT_NEW_TOKENS,
    stop: options.Stop = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    seed: options.Seed = None,
    speculate: options.Speculate = 0,
    session: options.SessionFile = None,
    threads: options.Threads = None,
    no_check: options.NoCheck = False,
    require_signature: options.RequireSignature = None,
    quiet: options.Quiet = False,
) -> None:
    """Talk to a bundle; what was said stays in the ring, so each turn costs only its own tokens."""
    from runtime.cli.chat import Chat
    from runtime.cli.session_file import keep, resume
    from runtime.completion import Limits
    from runtime.load import load

    given = options.chosen(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty, seed=seed,
    )  # fmt: skip
    limits = Limits(max_new_tokens=max_new_tokens, stop=tuple(stop or ()), speculate=speculate)
    loaded = load(
        bundle, threads=threads, check=not no_check, require_signature=require_signature,
        stage=stage_for(quiet=quiet),
    )  # fmt: skip
    params = sampling_params(loaded.defaults, given)
    talk = Chat(loaded, params, limits, system)
    if session is None:
        talk.run()
        return
    talk.resume(resume(session, loaded).get("messages", []))
    try:
        talk.run()
    finally:
        keep(session, loaded, {"messages": talk.messages})


def inspect(
    *,
    bundle: options.BundlePath,
    require_signature: options.RequireSignature = None,
    as_json: options.Json = False,
) -> None:
    """Check a bundle's files and say what it is."""
    from runtime.bundle.describe import facts, show
    from runtime.bundle.open import open_bundle

    with stage_for(quiet=as_json)("Checking the bundle", None):
        opened = open_bundle(bundle, require_signature=require_signature)
    if as_json:
        print(json.dumps(facts(opened)))
    else:
        show(opened)


def bench(
    *,
    bundle: options.BundlePath,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 128,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds; medians are quoted.")] = 5,
    batch: Annotated[int, typer.Option(min=1, help="Sequences decoded side by side.")] = 1,
    positions: Annotated[
        int | None, typer.Option(min=2, help="Instead: generate N tokens, latency by position.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG of --positions; needs [report].")] = None,
    threads: options.Threads = None,
    no_check: options.NoCheck = False,
    require_signature: options.RequireSignature = None,
    as_json: options.Json = False,
) -> None:
    """Measure a bundle on this machine, and say which machine that was."""
    from runtime.load import load
    from runtime.measure import bench as benchmark

    if plot is not None and positions is None:
        raise UsageError("--plot draws latency against position; add --positions N.")
    if positions is not None and batch > 1:
        raise UsageError("--positions follows one sequence; leave --batch out.")
    if plot is not None:
        benchmark.check_plot(plot)
    stage = stage_for(quiet=as_json)
    loaded = load(
        bundle, rows=batch, threads=threads, check=not no_check,
        require_signature=require_signature, stage=stage,
    )  # fmt: skip
    result: dict[str, Any]
    if positions is not None:
        result = benchmark.measure_positions(loaded, positions, plot, stage)
    elif batch > 1:
        result = benchmark.measure_batch(loaded, prompt_tokens, new_tokens, repeat, stage)
    else:
        result = benchmark.measure(loaded, prompt_tokens, new_tokens, repeat, stage)
    print(json.dumps(result) if as_json else benchmark.to_text(result))


def _prompt(prompt: str | None, file: Path | None) -> str:
    """Read the prompt from wherever it was given; strictly UTF-8, and not empty."""
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
        where = file or "standard input"
        raise MistralcError(
            f"The prompt on {where} is not UTF-8 (byte {error.start} is 0x"
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
