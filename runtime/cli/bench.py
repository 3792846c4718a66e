"""The command bench. Knows only the command line; `runtime.measure.bench` does the measuring."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from graphs.errors import UsageError
from runtime.cli import options
from runtime.system.progress import stage_for


def bench(
    *,
    bundle: options.BundlePath,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 128,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds; medians are reported.")] = 5,
    batch: Annotated[int, typer.Option(min=1, help="Sequences decoded at the same time.")] = 1,
    positions: Annotated[
        int | None,
        typer.Option(min=2, help="Generate N tokens instead, and report latency by position."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Plot --positions to this PNG file; needs the extra `report`."),
    ] = None,
    loading: options.LoadOptions,
    as_json: options.Json = False,
) -> None:
    """Measure a bundle's speed on this machine, and report what the machine is."""
    from runtime.measure import bench as benchmark

    if plot is not None and positions is None:
        raise UsageError("--plot draws latency against position; add --positions N.")
    if positions is not None and batch > 1:
        raise UsageError("--positions measures one sequence; leave --batch out.")
    if plot is not None:
        benchmark.check_plot(plot)
    stage = stage_for(quiet=as_json)
    loaded = loading.load(bundle, stage, rows=batch)
    result: dict[str, Any]
    if positions is not None:
        result = benchmark.measure_positions(loaded, positions, plot, stage)
    elif batch > 1:
        result = benchmark.measure_batch(loaded, prompt_tokens, new_tokens, repeat, stage)
    else:
        result = benchmark.measure(loaded, prompt_tokens, new_tokens, repeat, stage)
    print(json.dumps(result) if as_json else benchmark.to_text(result))
