"""What a bundle is, for people and for machines. Knows nothing about loading one."""

import json
from collections.abc import Mapping
from typing import Any

from runtime.bundle.open import Bundle
from runtime.bundle.signature import read_signature


def facts(bundle: Bundle) -> dict[str, Any]:
    """The manifest, and what follows from it."""
    manifest = bundle.manifest
    model, ring = manifest.model, manifest.ring
    derived = {
        "parameters": model.num_parameters,
        "capacities": {str(size): ring.capacity(size) for size in model.windows},
        "kv_bytes_per_token": manifest.contract.token_bytes,
        "ring_bytes": manifest.contract.ring_bytes,
        "bundle_bytes": sum(entry.size for entry in manifest.files.values()),
        "endless": model.slides,
    }
    return {"path": str(bundle.path), "manifest": json.loads(manifest.to_text()),
            "signed_by": bundle.signed_by, **derived}  # fmt: skip


def show(bundle: Bundle) -> None:
    """Print the facts as a table."""
    manifest, derived = bundle.manifest, facts(bundle)
    model, ring = manifest.model, manifest.ring
    by_user = " (chosen at export)" if manifest.window_source == "user" else ""
    windows = ", ".join("none" if size is None else f"{size:,}" for size in model.windows)
    end = "none: the text may run on" if model.slides else f"at {ring.context:,} tokens"
    slots = ", ".join(f"{slots:,}" for slots in derived["capacities"].values())
    rows = {
        "checkpoint": f"{manifest.checkpoint['name']} ({manifest.checkpoint['format']})",
        "runs on": f"{manifest.target}, {manifest.precision}, activations {manifest.activation}"
        + (", batch-invariant" if manifest.batch_invariant else ""),
        "parameters": f"{derived['parameters']:,}",
        "layers": f"{model.num_hidden_layers}, hidden {model.hidden_size:,}, "
        f"heads {model.num_attention_heads}:{model.num_key_value_heads} of {model.head_dim}",
        "window": windows + by_user,
        "end of context": end,
        "ring": f"{slots} slots, chunk {ring.chunk:,}, "
        f"{derived['ring_bytes'] / 1e6:,.1f} MB when full, "
        f"{derived['kv_bytes_per_token']:,} bytes a token",
        "size": f"{derived['bundle_bytes'] / 1e6:,.1f} MB in {len(manifest.files)} intact files",
        "verified": _verdict(bundle),
        "signed": _signer(bundle),
        **_engine(manifest.engine),
        "made with": ", ".join(f"{name} {number}" for name, number in manifest.versions.items()),
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


def _signer(bundle: Bundle) -> str:
    """Who signed the bundle, as far as anyone has asked."""
    if bundle.signed_by is not None:
        return f"by the required key {bundle.signed_by}"
    if read_signature(bundle.path) is None:
        return "no"
    return "yes, and not checked: no --require-signature was given"


def _engine(record: Mapping[str, Any] | None) -> dict[str, str]:
    """The audit of a plan in a few words; empty for a bundle that holds a graph."""
    if record is None:
        return {}
    ratio = record["plan_bytes"] / record["weight_bytes"]
    facts = (
        f"{record['attention_fused']} of {record['attention']} attention layers fused",
        f"{record['caches_in_place']} of {record['caches']} caches in place",
        f"plan {ratio:.3f} times the weights",
        f"built by TensorRT {record['tensorrt']} for "
        + (", ".join(record["gpus"]) or "every GPU that it supports"),
    )
    return {"engine": ", ".join(facts), "faults": "; ".join(record["faults"]) or "none"}


def _verdict(bundle: Bundle) -> str:
    record = bundle.manifest.verification
    if record is None:
        return "not yet; run `mistralc verify`"
    worst = max(record["cases"], key=lambda case: case["max_rel"])
    outcome = "passed" if record["passed"] else "FAILED"
    return f"{outcome} against {record['against']}, logits within {worst['max_rel']:.1e}"
