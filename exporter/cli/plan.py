"""The command plan: its options, its tables and its JSON. Does no arithmetic of its own.

Heavy imports stand inside the command, so that `mistralc --help` answers at once.
"""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphs.errors import UsageError
from graphs.gpu_catalogue import GPUS, Gpu, find_gpu
from runtime.cli import options

if TYPE_CHECKING:
    from exporter.estimate import Fit, Plan

LEFT = ("--gpu", "--target", "fits")  # columns of words


def plan(
    *,
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="As for export; config.json is enough.")
    ],
    gpu: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(GPUS)}; all, in short, if left out.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, rtx or tensorrt; rtx, where the GPU can, if left out."),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="fp32, fp16, bf16, int8, int8wo, int4wo or fp8; "
                     "fp16 (cpu: fp32) if left out."),
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="Make every layer see N tokens.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of a model without a window.")
    ] = None,
    chunk: Annotated[int | None, typer.Option(min=1, help="Most prompt tokens per step.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    as_json: options.Json = False,
) -> None:  # fmt: skip
    """Say what a checkpoint will need, and on which GPU it fits, before anything is loaded."""
    chosen = None if gpu is None else find_gpu(gpu)
    if target == "cpu" and chosen is not None:
        raise UsageError("--gpu belongs to a GPU's target; leave it out with --target cpu.")
    from exporter.checkpoint.config_hf import override_window
    from exporter.checkpoint.open import read_spec
    from exporter.estimate import activation_of, fit
    from exporter.estimate import plan as work_out
    from exporter.export import ExportOptions, ring_spec

    precision = precision or ("fp32" if target == "cpu" else "fp16")
    activation_of(target or "rtx", precision)  # refuses a wrong pair before anything is read
    asked = ExportOptions(
        target=target or "rtx", window=window, context=context, chunk=chunk, max_batch=batch
    )
    spec = read_spec(checkpoint)
    if window is not None:
        spec = override_window(spec, window)
    ring = ring_spec(spec, asked)
    gpus = [] if target == "cpu" else [chosen] if chosen else list(GPUS.values())
    fits = [fit(work_out(spec, ring, target or _engine(each), precision), each) for each in gpus]
    needed = fits[0].plan if fits else work_out(spec, ring, target or "rtx", precision)
    if as_json:
        print(
            json.dumps({"checkpoint": checkpoint, **facts(needed), "gpus": list(map(_fit, fits))})
        )
    else:
        _show(checkpoint, needed, fits)


def _engine(gpu: Gpu) -> str:
    return "rtx" if gpu.runs_rtx else "tensorrt"


def facts(needed: "Plan") -> dict[str, Any]:
    """The plan as plain data; keys end in their unit."""
    from exporter.estimate import RUNTIME_RESERVE

    slots = {str(size): count for size, count in needed.ring_slots.items()}
    derived = {
        "ring_slots": slots,
        "activation_bytes": needed.activation_bytes,
        "run_bytes": needed.run_bytes,
        "runtime_reserve_bytes": RUNTIME_RESERVE,
    }
    return asdict(needed) | derived


def _fit(one: "Fit") -> dict[str, Any]:
    data = asdict(one) | {"target": one.plan.target, "fits": one.fits}
    del data["plan"]
    return data


def _show(checkpoint: str, needed: "Plan", fits: list["Fit"]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(overflow="fold")  # a long path stays whole
    for name, value in (_rows(checkpoint, needed) | _host_rows(needed)).items():
        table.add_row(name, value)
    if len(fits) == 1:
        for name, value in _gpu_rows(needed, fits[0]).items():
            table.add_row(name, value)
    console.print(table)
    if len(fits) > 1:
        console.print()
        console.print(_gpu_table(fits))
        refusals = {one.refusal for one in fits if one.refusal}
        notes = [f"refused: {text}." for text in sorted(refusals)]
        console.print("\n".join(["", *notes, f"{_how(needed)}."]))


def _rows(checkpoint: str, needed: "Plan") -> dict[str, str]:
    spec, ring = needed.spec, needed.ring
    windows = ", ".join("none" if size is None else f"{size:,}" for size in spec.windows)
    slots = ", ".join(f"{count:,}" for count in needed.ring_slots.values())
    rows = f"{ring.max_batch} rows of " if ring.max_batch > 1 else ""
    parts = {name: _size(size) for name, size in needed.activation_parts.items()}
    return {
        "checkpoint": f"{checkpoint}, {needed.precision} for {needed.target}",
        "parameters": f"{needed.parameters:,} ({needed.parameters / 1e9:,.2f} B)",
        "weights": f"{_size(needed.weight_bytes)}{_policy(needed)}",
        "window": f"{windows}; ring of {slots} slots, chunk {ring.chunk:,}",
        "KV cache": f"{needed.kv_bytes_per_token:,} bytes a token, "
        f"{rows}ring {_size(needed.ring_bytes)} in all",
        "  without GQA": f"{needed.kv_bytes_per_token_multi_head:,} bytes a token, "
        f"{_size(needed.ring_bytes_multi_head)}",
        "  without window": f"{_size(needed.kv_bytes_unwindowed)} "
        f"at {spec.max_position_embeddings:,} positions",
        "activations": f"{_size(needed.activation_bytes)}: the largest of logits "
        f"{parts['logits']}, MLP {parts['mlp']}, mask and scores {parts['attention']}",
        "to run": f"{_size(needed.run_bytes)}: weights, ring and activations",
    }


def _policy(needed: "Plan") -> str:
    from exporter.estimate import UNQUANTIZED

    if needed.precision in UNQUANTIZED:
        return ""
    return f": codes and scales of the linears, everything else in {needed.activation}"


def _host_rows(needed: "Plan") -> dict[str, str]:
    host = needed.host
    steps = ", ".join(f"{name} {seconds:,.0f} s" for name, seconds in host.seconds.items())
    return {
        "build host": f"{_size(host.memory_bytes)} of memory, {_size(host.disk_bytes)} of disk, "
        f"of which the bundle keeps {_size(host.bundle_bytes)}",
        "build time": f"about {_time(sum(host.seconds.values()))}: {steps}",
        "  at": _rates(needed),
    }


def _rates(needed: "Plan") -> str:
    from exporter import estimate as arithmetic

    last = (
        f"{arithmetic.PLAN_RATE / 1e6:,.0f} MB/s of plan"
        if needed.target in arithmetic.ENGINES
        else f"{arithmetic.VERIFY_RATE / 1e6:,.0f} million weights/s verified"
    )
    return (
        f"{arithmetic.WRITE_RATE / 1e6:,.0f} MB/s written, {arithmetic.HASH_RATE / 1e9:,.1f} GB/s "
        f"hashed, {last}: measured on 2 cores"
    )


def _gpu_rows(needed: "Plan", one: "Fit") -> dict[str, str]:
    gpu = one.gpu
    verdict = f"fits, {_size(one.left_bytes)} left"
    if one.refusal:
        verdict = f"does not run: {one.refusal}"
    elif not one.fits:
        verdict = f"does not fit: {_size(-one.left_bytes)} too little"
    return {
        "GPU": f"{_describe(gpu)} ({gpu.source})",
        "  verdict": verdict,
        "  roofline": f"{one.tokens_per_s:,.0f} tokens/s at most",
        "  how": _how(needed),
    }


def _how(needed: "Plan") -> str:
    from exporter.estimate import RUNTIME_RESERVE

    rows = needed.ring.max_batch
    return (
        f"{_size(RUNTIME_RESERVE)} are kept free for CUDA's context and kernels (assumed); a step "
        f"reads {_size(needed.read_bytes_per_step)}, weights and full ring, for "
        f"{rows} token{'s' if rows > 1 else ''}"
    )


def _gpu_table(fits: list["Fit"]) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("--gpu", "--target", "memory", "bandwidth", "fits", "left", "most tokens/s"):
        table.add_column(title, justify="left" if title in LEFT else "right")
    names = {gpu.name: key for key, gpu in GPUS.items()}
    for one in fits:
        table.add_row(
            names[one.gpu.name],
            one.plan.target,
            _size(one.gpu.memory_bytes),
            f"{one.gpu.bandwidth_bytes_per_s / 1e9:,.0f} GB/s",
            "refused" if one.refusal else "yes" if one.fits else "no",
            _size(one.left_bytes),
            f"{one.tokens_per_s:,.0f}",
        )
    return table


def _describe(gpu: Gpu) -> str:
    return (
        f"{gpu.name}, compute capability {gpu.compute_capability}, {_size(gpu.memory_bytes)}, "
        f"{gpu.bandwidth_bytes_per_s / 1e9:,.0f} GB/s"
    )


def _size(size: int) -> str:
    if abs(size) >= 10**9:
        return f"{size / 1e9:,.2f} GB"
    return f"{size / 1e6:,.1f} MB" if abs(size) >= 10**5 else f"{size / 1e3:,.1f} kB"


def _time(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds < 100 else f"{seconds / 60:,.0f} min"
