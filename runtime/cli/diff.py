"""The command diff: its options and tables. `runtime.measure.diff` does the comparing."""

import json
from collections.abc import Iterator
from itertools import groupby, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runtime.cli import options
from runtime.system.progress import stage_for

if TYPE_CHECKING:
    from runtime.bundle.open import Bundle
    from runtime.measure.diff import Change, Difference, File

DIFFERENT = 3  # exit status with --exit-code; 1 and 2 are failures, as everywhere

MAX_VALUE = 40  # characters of a value in the table
MAX_LINES = 20  # of one top-level field; a scheme for every weight would be hundreds


def diff(
    *,
    a: Annotated[Path, typer.Argument(metavar="A", help="A bundle.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The bundle to compare it with.")],
    static: Annotated[
        bool, typer.Option("--static", help="Compare only manifests and files; load nothing.")
    ] = False,
    exit_code: Annotated[
        bool,
        typer.Option(
            "--exit-code", help=f"Exit with status {DIFFERENT} unless the bundles are identical."
        ),
    ] = False,
    threads: options.Threads = None,
    require_signature: options.RequireSignature = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare two bundles: manifest, files, logits on their golden texts, latency, memory."""
    from runtime.bundle.open import open_bundle
    from runtime.measure.diff import compare

    stage = stage_for(quiet=quiet or as_json)
    with stage("Checking the bundles", None):
        one, two = (open_bundle(path, require_signature=require_signature) for path in (a, b))
    found = compare(one, two, static=static, threads=threads, stage=stage)
    if as_json:
        print(json.dumps({"a": str(a), "b": str(b), **found.to_json()}))
    else:
        print("\n".join(_lines(one, two, found)))
    if exit_code and not found.identical:
        raise typer.Exit(DIFFERENT)


def _lines(a: "Bundle", b: "Bundle", found: "Difference") -> Iterator[str]:
    for letter, bundle in (("A", a), ("B", b)):
        manifest = bundle.manifest
        yield f"{letter}  {bundle.path}  {manifest.target}, {manifest.precision}"
    if found.identical:
        yield "\nidentical: all files have the same bytes"
    if found.changes:
        yield "\nmanifest (A → B)"
        yield from _changes(found.changes)
    yield "\nfiles"
    yield from _files(found.files)
    if found.logits is not None:
        yield f"\nlogits at {found.logits.positions} positions of {found.logits.texts} golden texts"
        yield f"  largest difference  {found.logits.max_abs:.3g}"
        yield f"  same first choice   {found.logits.top1:.1%}"
        yield f"  KL(A || B)          {found.logits.kl:.3g} nats, {found.logits.max_kl:.3g} at most"
    if found.latency is not None:
        ratio = found.latency.b_ms / found.latency.a_ms
        yield f"\nlatency of a step, median of {found.latency.steps} each, alternating"
        yield (
            f"  A {found.latency.a_ms:,.3f} ms   B {found.latency.b_ms:,.3f} ms   B/A {ratio:.3f}"
        )
    yield "\nmemory"
    for letter, memory in zip("AB", found.memory, strict=True):
        resident = "" if memory.resident is None else (
            f", {memory.resident / 1e6:,.1f} MB resident once loaded"
        )  # fmt: skip
        yield (
            f"  {letter} {memory.files / 1e6:,.1f} MB of files, "
            f"{memory.ring / 1e6:,.1f} MB of full ring{resident}"
        )
    if found.left_out:
        yield "\nnot compared"
        yield from (f"  {reason}" for reason in found.left_out)


def _changes(changes: "tuple[Change, ...]") -> Iterator[str]:
    """Return the changes as a tree: each group of fields once, with its fields under it."""
    above: tuple[str, ...] = ()
    for top, group in groupby(changes, key=lambda change: change.field[0]):
        found = list(group)
        for change in found[:MAX_LINES]:
            *groups, name = change.field
            same = (one == two for one, two in zip(above, groups, strict=False))
            known = sum(takewhile(bool, same))
            for depth, part in enumerate(groups[known:], known + 1):
                yield f"{'  ' * depth}{part}"
            above = tuple(groups)
            yield f"{'  ' * len(change.field)}{name}: {_value(change.a)} → {_value(change.b)}"
        if len(found) > MAX_LINES:
            yield f"    and {len(found) - MAX_LINES} more in {top}; --json lists them"


def _value(value: Any) -> str:
    from runtime.measure.diff import ABSENT

    text = "(nothing)" if value is ABSENT else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_VALUE else f"{text[: MAX_VALUE - 1]}…"


def _files(files: "tuple[File, ...]") -> Iterator[str]:
    width = max(len(file.name) for file in files)
    for file in files:
        sizes = ["-" if size is None else f"{size:,}" for size in (file.a, file.b)]
        if file.same:
            verdict = "same"
        elif file.a is None or file.b is None:
            verdict = "only in B" if file.a is None else "only in A"
        else:
            verdict = f"differs, {file.b - file.a:+,} bytes"
        yield f"  {file.name:<{width}}  {sizes[0]:>15}  {sizes[1]:>15}  {verdict}"
