"""Fuzz what a production host opens: manifest, bundle files, hash cache. Loads no model."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from graphs.manifest import CHECKSUM, FILE_NAME, FileEntry, Manifest, _checksum
from graphs.spec import RingSpec
from runtime.bundle.describe import facts
from runtime.bundle.open import SETTLED_NS, cache_file, open_bundle, sha256
from runtime.doctor.bundle_checks import check_bundle, rebuild_command
from runtime.system.host import Cuda, Library
from tests.reliability.harness.damage import Draw, Raw, damaged_bytes, damaged_json
from tests.reliability.harness.target import Files, Folder, Prepared, Target
from tests.reliability.targets.checkpoints import small_spec

FILES = {"model.onnx": b"a graph" * 30, "weights.safetensors": bytes(range(256)) * 4,
         "tokenizer.json": b"{}", "tokenizer_config.json": b"{}", "generation_config.json": b"{}",
         "engine.plan": b"a plan", "report/verify.md": b"# Passed\n"}  # fmt: skip
LIBRARIES = {
    name: Library(name=name, version=None) for name in ("onnxruntime", "tensorrt_rtx", "tensorrt")
}


def write_bundle(folder: Path) -> Manifest:
    """Write a bundle that is valid except for the contents of its graph and weights."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = {}
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        entries[name] = FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    manifest = Manifest(
        target="cpu", precision="fp32", activation="float32", model=small_spec(),
        ring=RingSpec(chunk=8, context=64), window_source="checkpoint",
        checkpoint={"name": "tiny", "format": "huggingface", "fingerprint": "0" * 64},
        versions={"mistralc": "0.1.0", "onnxruntime": "1.31.1"}, passes={"merge_linears": 2},
        golden=({"ids": [1, 2, 3, 4], "expected": [[1, 2], [3, 4]]},), files=entries,
        verification={"passed": True, "against": "the checkpoint", "cases": []},
    )  # fmt: skip
    (folder / FILE_NAME).write_text(manifest.to_text(), encoding="utf-8")
    return manifest


def restamped(data: bytes) -> bytes:
    """The damaged manifest with a recomputed checksum, if it is still a JSON object."""
    try:
        value = json.loads(data)
        value.pop(CHECKSUM, None)
        return (json.dumps(value | {CHECKSUM: _checksum(value)}, indent=2) + "\n").encode()
    except (ValueError, AttributeError, TypeError, RecursionError):
        return data


def _manifest(folder: Path) -> Prepared:
    """Damage that the checksum detects, and changes with a recomputed checksum."""
    write_bundle(folder)
    tree = json.loads((folder / FILE_NAME).read_bytes())
    engine = {"gpus": ["sm89"], "plan_bytes": 1, "weight_bytes": 1, "faults": []}
    trees = st.sampled_from((tree, tree | {"target": "rtx", "engine": engine}))
    plain = trees.flatmap(damaged_json)
    cases = (plain | plain.map(restamped) | plain.map(restamped)).map(lambda it: {FILE_NAME: it})
    return Prepared(cases=cases, read=Folder(folder).reader(_open))


def _open(folder: Path) -> None:
    """Open a bundle and describe it, as `inspect` and `doctor` do."""
    bundle = open_bundle(folder)
    manifest = bundle.manifest
    for name, entry in manifest.files.items():
        path = folder / name
        assert path.resolve().is_relative_to(folder.resolve()), f"{name} is outside the bundle"
        assert (path.stat().st_size, sha256(path)) == (entry.size, entry.sha256)
    assert Manifest.from_text(manifest.to_text(), "again") == manifest
    assert json.loads(json.dumps(facts(bundle)))["parameters"] > 0
    assert rebuild_command(folder, manifest).startswith("mistralc export ")
    checks = check_bundle(folder, LIBRARIES, (), Cuda(problem="no driver"))
    assert all(isinstance(check.found, str) for check in checks)


def _files(folder: Path) -> Prepared:
    """Every change to any file must be refused."""
    write_bundle(folder)
    open_bundle(folder)  # the hash cache now holds the hashes of the valid files

    @st.composite
    def cases(draw: Draw) -> Files:
        name = draw(st.sampled_from(sorted(FILES)))
        return {name: draw(damaged_bytes(FILES[name]).filter(lambda it: it != FILES[name]))}

    def read(path: Path) -> None:
        open_bundle(path)
        raise AssertionError("a changed file was accepted")

    return Prepared(cases=cases(), read=Folder(folder).reader(read), good=None)


def _hashes(folder: Path) -> Prepared:
    """Whatever the hash cache holds, the bundle opens as if there were no cache."""
    bundle = folder / "bundle"
    write_bundle(bundle)
    time.sleep(1e-9 * SETTLED_NS)  # the cache does not store hashes of younger files
    open_bundle(bundle)
    cache = cache_file()
    assert cache is not None
    good = json.loads(cache.read_bytes())
    entries: dict[str, Any] = {k: v for k, v in good.items() if k.startswith(str(bundle))}
    odd = st.sampled_from(([1], Raw("[]"), {str(bundle): 1}, entries | {"\0": [1]}))
    cases = (damaged_json(entries) | odd.flatmap(damaged_json)).map(lambda it: {"hashes": it})

    def read(case: Files) -> None:
        cache.write_bytes(case["hashes"])
        open_bundle(bundle)

    return Prepared(cases=cases, read=read, good={"hashes": b"{}"})


TARGETS = (
    Target(name="bundle's manifest", prepare=_manifest, examples=250),
    Target(name="bundle's files", prepare=_files, examples=60),
    Target(name="hash cache", prepare=_hashes, examples=60),
)
