"""Describe a bundle, for people and for machines. Loads nothing but the manifest."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from graphs.attention_form import summarize
from graphs.build import Build
from graphs.gpu_catalogue import GPUS
from graphs.manifest import Manifest
from graphs.quant_scheme import Scheme
from runtime.bundle.open import Bundle
from runtime.bundle.signature import read_signature

_OFFSETS = {"none": "", "zero_point": ", with zero points", "minimum": ", with minimums"}


def facts(bundle: Bundle) -> dict[str, Any]:
    """Return the manifest, and what follows from it, as plain data for JSON."""
    manifest = bundle.manifest
    model, ring = manifest.model, manifest.ring
    derived = {
        "parameters": model.num_parameters,
        "capacities": {str(size): ring.capacity(size) for size in model.windows},
        "kv_bytes_per_token": manifest.contract.token_bytes,
        "ring_bytes": manifest.contract.ring_bytes,
        "bundle_bytes": manifest.file_bytes,
        "endless": model.slides,
        "tokens_per_s_at_most": token_bounds(manifest),
    }
    return {"path": str(bundle.path), "manifest": json.loads(manifest.to_text()),
            "signed_by": bundle.signed_by, **derived}  # fmt: skip


def describe(bundle: Bundle) -> str:
    """Return a table of what the bundle is: one fact a line, its name in the first column.

    Raises MistralcError if this version has no such target or precision.
    """
    manifest = bundle.manifest
    rows = [
        ("checkpoint", _checkpoint(manifest.checkpoint)),
        *_build(manifest.build),
        ("size", f"{manifest.file_bytes / 1e6:,.1f} MB in {len(manifest.files)} intact files"),
        ("verified", _verdict(bundle)),
        *_text(manifest),
        ("signed", _signer(bundle)),
        *_audit(manifest),
        ("made with", ", ".join(f"{name} {number}" for name, number in manifest.versions.items())),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _checkpoint(origin: Mapping[str, str]) -> str:
    left_out = f" without {origin['left_out']}" if "left_out" in origin else ""
    merged = f", with {origin['adapters']} merged" if "adapters" in origin else ""
    return f"{origin['name']} ({origin['format']}){left_out}{merged}"


def _build(build: Build) -> Iterator[tuple[str, str]]:
    """What was decided at export."""
    spec, ring, contract = build.spec, build.ring, build.contract
    target, precision = build.target, build.precision
    invariant = ", batch-invariant" if build.batch_invariant else ""
    yield "target", f"{target.name} ({target.title}){invariant}"
    yield "precision", f"{precision.name} ({precision.summary}), computes in {build.activation}"
    for i, line in enumerate(_quantized(build)):
        yield ("" if i else "quantized"), line
    yield "parameters", f"{spec.num_parameters:,}"
    yield (
        "layers",
        f"{spec.num_hidden_layers}, hidden size {spec.hidden_size:,}, "
        f"{spec.num_attention_heads} query and {spec.num_key_value_heads} key/value heads of "
        f"{spec.head_dim}",
    )
    yield "window", _window(build)
    yield "longest text", "unlimited" if spec.slides else f"{ring.context:,} tokens"
    slots = ", ".join(f"{ring.capacity(size):,}" for size in spec.windows)
    yield (
        "ring",
        f"{slots} slots, chunk {ring.chunk:,}, {contract.ring_bytes / 1e6:,.1f} MB when full, "
        f"{contract.token_bytes:,} bytes a token",
    )
    yield "attention", summarize(build.attention)
    if spec.rope_scaling is not None and spec.rope_scaling.note is not None:
        yield "rotation", spec.rope_scaling.note
    if ring.max_batch > 1:
        yield "batch", f"up to {ring.max_batch} sequences"


def _quantized(build: Build) -> Iterator[str]:
    """How many weights are stored by each scheme, most first; nothing if all are floats."""
    schemes, total = build.storage.schemes, len(build.spec.weight_shapes())
    for scheme, count in Counter(schemes.values()).most_common():
        yield f"{count:,} of {total:,} weights: {_scheme(scheme)}"
    if build.storage.copied:
        yield f"{len(build.storage.copied):,} of these keep the checkpoint's own codes"


def _scheme(scheme: Scheme) -> str:
    shared = "row" if scheme.block is None else f"block of {scheme.block}"
    rounded = "" if scheme.activation is None else f"; inputs are rounded to {scheme.activation}"
    return f"{scheme.codes}, one scale per {shared}{_OFFSETS[scheme.offset]}{rounded}"


def _window(build: Build) -> str:
    """The window of each layer, and whose choice it was."""
    source = "chosen at export" if build.window_source == "user" else "from the checkpoint"
    layers, count = Counter(build.spec.layer_windows), build.spec.num_hidden_layers
    if layers.keys() == {None}:
        return f"none: every layer sees the whole text ({source})"
    if len(layers) == 1:
        return f"{build.spec.windows[0]:,} tokens in every layer ({source})"
    parts = (
        f"{'none' if size is None else f'{size:,} tokens'} in {layers[size]} of {count} layers"
        for size in build.spec.windows
    )
    return f"{', '.join(parts)} ({source})"


def _signer(bundle: Bundle) -> str:
    """Who signed the bundle, if that was checked."""
    if bundle.signed_by is not None:
        return f"by the required key {bundle.signed_by}"
    if read_signature(bundle.path) is None:
        return "no"
    return "yes, but not checked: no --require-signature was given"


def token_bounds(manifest: Manifest) -> dict[str, float]:
    """Tokens per second that a GPU's bandwidth allows a plan for one row, by the GPU's name.

    Only GPUs that the target supports. Empty without an audit that counted bytes.
    """
    decode = (manifest.engine or {}).get("decode")
    if decode is None:
        return {}
    target = manifest.build.target
    return {
        gpu.name: gpu.bandwidth_bytes_per_s / decode["total"]
        for gpu in GPUS.values()
        if target.supports(gpu.compute_capability)
    }


def _audit(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """The audit of a plan in a few words; nothing for a bundle that holds a graph."""
    record = manifest.engine
    if record is None:
        return
    ratio = record["plan_bytes"] / record["weight_bytes"]
    gpus = ", ".join(record["gpus"]) or "every GPU that it supports"
    version = record.get("tensorrt_version", "of an unrecorded version")
    yield (
        "engine",
        f"{record['attention_fused']} of {record['attention']} attention layers fused, "
        f"{record['caches_in_place']} of {record['caches']} caches in place, "
        f"plan {ratio:.3f} times the weights, built by TensorRT {version} for {gpus}",
    )
    yield "faults", "; ".join(record["faults"]) or "none"
    decode = record.get("decode")
    if decode is None:  # an older bundle, whose audit counted no bytes
        return
    parts = ", ".join(f"{name} {decode[name] / 1e6:,.1f} MB"
                      for name in ("weights", "cache", "activations", "moved"))  # fmt: skip
    yield (
        "a token",
        f"{decode['kernels']} kernels read and write {decode['total'] / 1e6:,.1f} MB: {parts}",
    )
    bounds = ", ".join(f"{name} {bound:,.0f}" for name, bound in token_bounds(manifest).items())
    yield "at most", f"{bounds} tokens/s: bandwidth / bytes, one row"


def _text(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """What the tokenizer was compared with, and where the bundle differs from its files."""
    record = manifest.text
    if record is None:
        return
    if record["strings"]:
        chats = f" and {record['chats']} chats" if record["chats"] else ""
        yield (
            "text",
            f"{record['strings']} strings{chats}: the token ids of {record['compared_with']}",
        )
    else:
        yield "text", f"compared with {record['compared_with']}"
    for note in (*record.get("overruled", ()), *record.get("notes", ())):
        yield "", note


def _verdict(bundle: Bundle) -> str:
    record = bundle.manifest.verification
    if record is None:
        return "not yet; run `mistralc verify`"
    worst = max(record["cases"], key=lambda case: case["max_rel"])
    outcome = "passed" if record["passed"] else "FAILED"
    return f"{outcome} against {record['against']}, logits within {worst['max_rel']:.1e}"
