"""What `make polygraphy` needs no GPU for: the graph, the inputs, and Polygraphy running both."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gpu.engines import compare, inputs
from exporter.checkpoint.open import open_checkpoint
from exporter.decide import decide
from exporter.options import BuildOptions
from graphs.errors import UsageError
from graphs.manifest import FILE_NAME, Manifest
from graphs.targets import TARGETS
from tests.support.make_checkpoint import tiny_spec, write_checkpoint


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Manifest]:
    """A directory with the manifest of an engine, and the checkpoint that it was made of."""
    folder = tmp_path_factory.mktemp("polygraphy")
    checkpoint = write_checkpoint(folder / "checkpoint", tiny_spec(window=100))
    build = decide(tiny_spec(window=100), TARGETS["rtx"], BuildOptions(precision="fp16", chunk=64))
    manifest = Manifest(
        target="rtx", precision="fp16", activation="float16", model=build.spec, ring=build.ring,
        window_source="checkpoint", versions={}, files={},
        checkpoint={"name": "x", "format": "huggingface",
                    "fingerprint": open_checkpoint(checkpoint).fingerprint()},
    )  # fmt: skip
    (folder / FILE_NAME).write_text(manifest.to_text())
    return folder, checkpoint, manifest


def test_both_runs_get_the_same_numbers(bundle: tuple[Path, Path, Manifest]) -> None:
    build = bundle[2].build
    graph = list(inputs.feeds(build, np.dtype(np.float32)))
    engine = list(inputs.feeds(build, np.dtype(np.float16)))
    assert [feed["input_ids"].shape[1] for feed in graph] == [64, 1, 64]
    for one, other in zip(graph, engine, strict=True):
        assert one.keys() == {tensor.name for tensor in build.contract.inputs}
        for name, numbers in one.items():
            assert np.array_equal(numbers, other[name].astype(numbers.dtype))
    assert not graph[0]["past_key.0"].any()
    assert graph[1]["past_key.0"].any()
    capacity = max(build.contract.capacities.values())
    assert graph[1]["position_ids"][0, 0] > capacity, "after the ring has wrapped"


def test_polygraphy_runs_the_graph_on_these_inputs(
    bundle: tuple[Path, Path, Manifest], tmp_path: Path
) -> None:
    folder, checkpoint, manifest = bundle
    compare.write_float32_graph(manifest, str(checkpoint), tmp_path)
    (first, dtype), (second, plan_dtype) = compare.commands(
        folder, manifest, tmp_path, layers=False
    )
    environment = {**os.environ, "MISTRALC_BUNDLE": str(folder), "MISTRALC_DTYPE": dtype,
                   "PYTHONPATH": str(compare.ROOT)}  # fmt: skip
    done = subprocess.run(first, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "present_value.1" in done.stdout
    assert (tmp_path / "graph-outputs.json").stat().st_size > 0
    assert plan_dtype == "float16"
    assert second[second.index("--load-outputs") + 1] == str(tmp_path / "graph-outputs.json")


def test_a_bundle_without_an_engine_is_refused(
    bundle: tuple[Path, Path, Manifest], tmp_path: Path
) -> None:
    manifest = replace(bundle[2], target="cuda")
    with pytest.raises(UsageError, match=r"for cuda in fp16; expected an engine"):
        compare.write_float32_graph(manifest, str(bundle[1]), tmp_path)
