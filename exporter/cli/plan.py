"""The command plan: its options, tables and JSON. Does no arithmetic of its own.

Heavy imports stand inside the command, so that `mistralc --help` answers at once.
"""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from exporter.options import BuildOptions
from graphs.attention_form import summarize
from graphs.errors import UsageError
from graphs.gpu_catalogue import GPUS, Gpu, find_gpu
from graphs.targets import TARGETS, Target, target_for_gpu, target_named
from runtime.cli import options as common

if TYPE_CHECKING:
    from exporter.estimate.model import Estimate, Fit
    from exporter.quantization.policy import WeightFacts

LEFT = ("--gpu", "--target", "fits")  # columns of words


def plan(
    *,
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="As for export; config.json is enough.")
    ],
    gpu: Annotated[
        str | None,
        typer.Option(help=f"One of {', '.join(GPUS)} (default: a short line for each)."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(TARGETS)} (default: rtx on the GPUs that it supports, "
                     "tensorrt on the others)."),
    ] = None,
    options: BuildOptions,
    as_json: common.Json = False,
) -> None:  # fmt: skip
    """Say what a checkpoint will need, and which GPUs it fits, before anything is loaded."""
    from exporter.checks.text_agreement import plan_notes
    from exporter.decide import decide, read_facts
    from exporter.estimate.model import estimate, fit
    from exporter.quantization.carry import describe_carried

    chosen = None if gpu is None else find_gpu(gpu)
    asked = None if target is None else target_named(target)
    if asked is not None and not asked.on_gpu and chosen is not None:
        raise UsageError(f"--gpu is for a GPU's target; leave it out with --target {asked.name}.")
    gpus = [chosen] if chosen else list(GPUS.values())
    if asked is not None and not asked.on_gpu:
        gpus = []
    targets = [asked or target_for_gpu(each.compute_capability) for each in gpus]
    for one in targets or [_first(asked)]:
        options.check(one)  # a wrong combination is refused before anything is read
    spec, facts = read_facts(checkpoint, options.adapters.lora)
    fits = [
        fit(estimate(decide(spec, one, options, facts), facts), each)
        for each, one in zip(gpus, targets, strict=True)
    ]
    needed = (
        fits[0].estimate if fits else estimate(decide(spec, _first(asked), options, facts), facts)
    )
    codes = describe_carried(needed.build, facts.codes)
    notes = list(plan_notes(checkpoint, options.adapters.lora, spec.vocab_size))
    if facts.method is not None and not facts.codes:
        notes.append(
            f"the configuration says that the weights are quantized ({facts.method}), and they are "
            "not here, so which of their codes would be kept is not known, and the plan is for "
            "floats unless a precision is given"
        )
    if as_json:
        result = {"checkpoint": checkpoint, **to_json(needed), "codes": codes,
                  "gpus": list(map(_fit, fits)), "notes": notes}  # fmt: skip
        print(json.dumps(result))
    else:
        _show(_named(checkpoint, facts), needed, codes, fits)
        for note in notes:
            print(f"note: {note}.")


def _named(checkpoint: str, facts: "WeightFacts") -> str:
    """The checkpoint, and what of it would be left out."""
    return f"{checkpoint} without {', '.join(facts.left_out)}" if facts.left_out else checkpoint


def _first(asked: Target | None) -> Target:
    return asked or next(one for one in TARGETS.values() if one.holds_plan)


def to_json(needed: "Estimate") -> dict[str, Any]:
    """The estimate as plain data; keys end in their unit."""
    from exporter.estimate.model import RUNTIME_RESERVE
    from graphs.passes.pipeline import passes_of

    build = needed.build
    times = needed.query_heads_per_group
    return {
        "target": build.target.name,
        "precision": build.precision.name,
        "activation": build.activation,
        "spec": build.spec.to_json(),
        "ring": asdict(build.ring),
        "attention": {str(size): form for size, form in build.attention.items()},
        "passes": [step.name for step in passes_of(build)],
        "parameters": needed.parameters,
        "weight_bytes": needed.weight_bytes,
        "kv_bytes_per_token": needed.kv_bytes_per_token,
        "kv_bytes_per_token_multi_head": times * needed.kv_bytes_per_token,
        "ring_slots": {str(size): count for size, count in needed.ring_slots.items()},
        "ring_bytes": needed.ring_bytes,
        "ring_bytes_multi_head": times * needed.ring_bytes,
        "kv_bytes_unwindowed": needed.kv_bytes_unwindowed,
        "activation_parts": dict(needed.activation_parts),
        "activation_bytes": needed.activation_bytes,
        "run_bytes": needed.run_bytes,
        "step_parts": dict(needed.step_parts),
        "step_bytes": needed.step_bytes,
        "runtime_reserve_bytes": RUNTIME_RESERVE,
        "host": asdict(needed.host)
        | {
            "memory_bytes": needed.host.memory_bytes,
            "seconds": needed.host.seconds,
        },
    }


def _fit(one: "Fit") -> dict[str, Any]:
    return {
        "gpu": asdict(one.gpu),
        "left_bytes": one.left_bytes,
        "tokens_per_s": one.tokens_per_s,
        "refusal": one.refusal,
        "target": one.estimate.build.target.name,
        "fits": one.fits,
    }


def _show(checkpoint: str, needed: "Estimate", codes: list[str], fits: list["Fit"]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(overflow="fold")  # a long path stays whole
    stored = {"stored codes": "\n".join(codes)} if codes else {}
    for name, value in (_rows(checkpoint, needed) | stored | _host_rows(needed)).items():
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


def _rows(checkpoint: str, needed: "Estimate") -> dict[str, str]:
    build = needed.build
    spec, ring, times = build.spec, build.ring, needed.query_heads_per_group
    windows = ", ".join("none" if size is None else f"{size:,}" for size in spec.windows)
    slots = ", ".join(f"{count:,}" for count in needed.ring_slots.values())
    rows = f"{ring.max_batch} rows of " if ring.max_batch > 1 else ""
    parts = {name: _size(size) for name, size in needed.activation_parts.items()}
    scaling = spec.rope_scaling
    return {
        "checkpoint": f"{checkpoint}, {build.precision.name} for {build.target.name}",
        "parameters": f"{needed.parameters:,} ({needed.parameters / 1e9:,.2f} B)",
        "weights": f"{_size(needed.weight_bytes)}{_policy(needed)}",
        "window": f"{windows}; ring of {slots} slots, chunk {ring.chunk:,}",
        "attention": summarize(build.attention),
        **({} if scaling is None or scaling.note is None else {"rotation": scaling.note}),
        "KV cache": f"{needed.kv_bytes_per_token:,} bytes a token, "
        f"{rows}ring {_size(needed.ring_bytes)} in all",
        "  without GQA": f"{times * needed.kv_bytes_per_token:,} bytes a token, "
        f"{_size(times * needed.ring_bytes)}",
        "  without window": f"{_size(needed.kv_bytes_unwindowed)} "
        f"at {spec.max_position_embeddings:,} positions",
        "activations": f"{_size(needed.activation_bytes)}: the largest of logits "
        f"{parts['logits']}, MLP {parts['mlp']}, mask and scores {parts['attention']}",
        "to run": f"{_size(needed.run_bytes)}: weights, ring and activations",
    }


def _policy(needed: "Estimate") -> str:
    build = needed.build
    if not build.precision.quantized:
        return ""
    return f": codes and scales of the linears, everything else in {build.activation}"


def _host_rows(needed: "Estimate") -> dict[str, str]:
    from exporter.estimate.host import CORES

    host = needed.host
    steps = ", ".join(f"{_step(one.name)} {_time(one.seconds)}" for one in host.steps)
    return {
        "build host": f"{_size(host.memory_bytes)} of memory, most of it while "
        f"{_step(host.largest.name)}; {_size(host.disk_bytes)} of disk, of which the bundle keeps "
        f"{_size(host.bundle_bytes)}",
        "  page cache": f"{_size(host.mapped_bytes)} of weights stay mapped; with less memory than "
        f"that beside the above, each of {host.passes} passes reads them from the disk again",
        "build time": f"about {_time(host.seconds)}: {steps}",
        "  at": f"{_rates(needed)}: measured on {CORES} cores",
    }


def _step(name: str) -> str:
    return name[0].lower() + name[1:]


def _rates(needed: "Estimate") -> str:
    from exporter.estimate import host

    rates = [f"{host.DISK_RATE / 1e6:,.0f} MB/s of disk"]
    if needed.build.precision.quantized:
        rates.append(f"{host.ROUND_RATE / 1e6:,.0f} million weights/s rounded by a core")
    if needed.build.target.holds_plan:
        rates.append(f"{host.PLAN_RATE / 1e6:,.0f} MB/s of plan")
    else:
        rates.append(f"{host.REFERENCE_RATE / 1e9:,.0f} GFLOP/s of a core for the reference")
    return ", ".join(rates)


def _gpu_rows(needed: "Estimate", one: "Fit") -> dict[str, str]:
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


def _how(needed: "Estimate") -> str:
    from exporter.estimate.model import RUNTIME_RESERVE

    rows = needed.build.ring.max_batch
    parts = ", ".join(f"{name} {_size(size)}" for name, size in needed.step_parts.items())
    return (
        f"{_size(RUNTIME_RESERVE)} are kept free for CUDA's context and kernels (assumed); a step "
        f"reads and writes {_size(needed.step_bytes)} ({parts}) for "
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
            one.estimate.build.target.name,
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
