"""Prove without a GPU that `cuda` bundles run on CUDA only and are captured as CUDA graphs.

    python -m benchmarks.gpu.stubs.prove [--cache build/stubs]

Exports tiny checkpoints in every precision of the target, with a window, without one, and mixed;
builds stub CUDA libraries; unpacks onnxruntime-gpu (255 MB, downloaded once) into the cache; and
opens each bundle there through the product's own session, with 1 and with 4 rows. Fails if a node
is not on CUDA, if capture is refused, if a tensor is bound twice, if a token is more than one
launch and the copies of its ids and logits, or if anything as large as a cache is copied. Prints
the kernel launches per token, now and as they were before. Takes 2 minutes on 2 cores.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.shapes import variant_model
from benchmarks.gpu.stubs import libraries, provider
from benchmarks.gpu.variants import SHIPPED, SYMBOLIC
from exporter.bundle.staging import write_model
from exporter.bundle.weights_file import link_weights
from exporter.decoder.trace import trace
from exporter.export import export
from exporter.options import ExportOptions
from exporter.quantization.make_recipe import stored_recipe
from graphs.errors import MistralcError
from graphs.manifest import read_manifest
from graphs.spec import ModelSpec
from graphs.targets import TARGETS
from tests.support.make_checkpoint import tiny_spec, write_checkpoint

ROOT = Path(__file__).resolve().parents[3]
CUDA = "CUDAExecutionProvider"
BATCHES = (1, 4)
WINDOW, CHUNK = 64, 16
WINDOWS: Mapping[str, tuple[int | None, ...]] = {
    "window": (WINDOW, WINDOW),
    "no window": (None, None),
    "mixed": (WINDOW, None),
}
DEEP = 32  # layers of the model whose launches are reported: those of Mistral-7B
STEPS = ("single", "chunk", "after")  # kinds of steps that are run, in this order
LIMIT = 300  # seconds for one bundle


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What `placement.py` found out about one bundle, and what is wrong with it."""

    bundle: str
    batch: int
    found: Mapping[str, Any]
    faults: tuple[str, ...]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "stubs")
    cache: Path = parser.parse_args().cache.resolve()
    stubbed = environment(cache)
    bundles = cache / "bundles"
    shutil.rmtree(bundles, ignore_errors=True)
    opened = list(matrix(bundles, stubbed))
    (cache / "report.json").write_text(json.dumps([*map(as_json, opened)], indent=2) + "\n")
    print(f"\nLaunches per token, {DEEP} layers, fp16, one row:")
    for windows, form, count, captured in deep_launches(bundles, stubbed):
        how = "one CUDA graph" if captured else "one by one"
        print(f"{windows:10} {form:10} {count:5} {how}", flush=True)
    failed = [one for one in opened if one.faults]
    print(f"{len(opened) - len(failed)} of {len(opened)} bundles are on CUDA alone and captured.")
    return 1 if failed else 0


def environment(cache: Path) -> dict[str, str]:
    """Environment variables with which a Python process sees the stubs and onnxruntime-gpu."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    package = provider.unpacked(cache, python)
    libraries.build([package / provider.CUDA_LIBRARY], cache / "libraries")
    return stub_environment(cache / "libraries", package)


def stub_environment(stubs: Path, *paths: Path) -> dict[str, str]:
    """The environment of this process with stub libraries first, and `paths` for imports."""
    site = libraries.SOURCES / "site"
    return {
        **os.environ,
        "LD_LIBRARY_PATH": str(stubs),
        "PYTHONPATH": os.pathsep.join(map(str, (site, *paths, ROOT))),
    }


def matrix(directory: Path, stubbed: Mapping[str, str]) -> Iterator[Opened]:
    """Export and open every bundle of the proof; prints each as soon as it is known."""
    for windows, layers in WINDOWS.items():
        spec = small_spec(layers)
        checkpoint = write_checkpoint(directory / f"checkpoint {windows}", spec)
        for precision in TARGETS["cuda"].activations:
            name = f"{precision}, {windows}"
            bundle = export_bundle(checkpoint, directory / name, precision)
            for batch in BATCHES:
                found = look(bundle, batch, stubbed)
                one = Opened(bundle=name, batch=batch, found=found, faults=tuple(faults(found)))
                print(line(one), flush=True)
                yield one


def small_spec(windows: tuple[int | None, ...]) -> ModelSpec:
    """A model with grouped heads of 64 features, which all of the provider's kernels accept."""
    return tiny_spec(
        num_hidden_layers=len(windows), layer_windows=windows, hidden_size=256,
        intermediate_size=384, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
    )  # fmt: skip


def export_bundle(checkpoint: Path, bundle: Path, precision: str) -> Path:
    options = ExportOptions(target="cuda", precision=precision, chunk=CHUNK, max_batch=max(BATCHES))
    export(str(checkpoint), bundle, options)
    return bundle


def look(
    bundle: Path, batch: int, stubbed: Mapping[str, str], variant: str = SHIPPED
) -> dict[str, Any]:
    """Run `placement.py` on a bundle; raises MistralcError with its last words if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.stubs.placement", bundle, "--batch", str(batch),
         "--variant", variant],
        env=stubbed, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=False,
    )  # fmt: skip
    if done.returncode:
        raise MistralcError(f"{bundle.name} was not opened over stubs: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def faults(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a bundle, in words; nothing if all is as it must be."""
    if set(found["nodes"]) != {CUDA}:
        yield f"nodes on the CPU: {', '.join(found['on_cpu']) or found['nodes']}"
    if found["memcpy_nodes"]:
        yield f"{found['memcpy_nodes']} nodes copy between host and device"
    if not found["captured"]:
        yield "capture was refused"
    if found["shared"]:
        yield f"share memory: {'; '.join(found['shared'])}"
    if found["captured"]:
        yield from _decode_faults(found)
    largest = max(step["largest_device_copy"] for kind in STEPS for step in found[kind])
    if largest >= found["smallest_cache_bytes"]:
        yield f"copies {largest} bytes at once; a cache has {found['smallest_cache_bytes']}"


def _decode_faults(found: Mapping[str, Any]) -> Iterator[str]:
    """Faults of single steps: the first is captured, all later ones are one launch each."""
    first, *later = found["single"]
    if (first["captures"], first["graphs"]) != (1, 1) or not first["recorded"]:
        yield f"the first token was not recorded as a graph: {first}"
    if first["recorded_host_copies"]:
        yield f"the graph copies {first['recorded_host_copies']} times between host and device"
    expected = {"graphs": 1, "kernels": 0, "products": 0, "allocations": 0, "host_copies": 2,
                "host_copied_bytes": found["inputs_bytes"] + found["logits_bytes"]}  # fmt: skip
    for step in (*later, *found["after"]):
        got = {name: step[name] for name in expected}
        if got != expected:
            yield f"a token should take {expected}, and takes {got}"
            break


def launches(found: Mapping[str, Any]) -> int:
    """Kernels and matrix products of one token, in a graph or launched one by one."""
    recorded = max(step["recorded"] for step in found["single"])
    last = found["single"][-1]
    return int(recorded or last["kernels"] + last["products"])


def deep_launches(
    directory: Path, stubbed: Mapping[str, str]
) -> Iterator[tuple[str, str, int, bool]]:
    """Launches per token of a deep model by window and variant, and whether they are captured."""
    for windows, size in (("window", WINDOW), ("no window", None)):
        checkpoint = write_checkpoint(directory / f"deep {windows}", small_spec((size,) * DEEP))
        bundle = export_bundle(checkpoint, directory / f"deep, {windows}", "fp16")
        for variant in (SYMBOLIC, SHIPPED):
            rewrite(bundle, variant)
            found = look(bundle, 1, stubbed, variant)
            yield windows, variant, launches(found), found["captured"]


def rewrite(bundle: Path, variant: str) -> None:
    """Replace the graph of a bundle by one of its variants, on the same weights."""
    manifest = read_manifest(bundle)
    recipe = stored_recipe(manifest.build, manifest.quantization)
    build = manifest.build
    model = variant_model(trace(build.spec, build.activation), build, recipe, variant)
    link_weights(model, recipe, bundle)
    write_model(model, bundle)


def line(one: Opened) -> str:
    """One bundle as a line of the table."""
    found = one.found
    nodes = ", ".join(f"{count} on {name[:-17]}" for name, count in found["nodes"].items())
    verdict = "; ".join(one.faults) or f"captured, {launches(found)} launches in one graph"
    return f"{one.bundle:18} batch {one.batch}: {nodes}; {'FAULT: ' * bool(one.faults)}{verdict}"


def as_json(one: Opened) -> dict[str, Any]:
    return {"bundle": one.bundle, "batch": one.batch, "faults": one.faults,
            "launches": launches(one.found), **one.found}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
