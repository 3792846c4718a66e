"""Run a bundle's engine and its graph on the same inputs with Polygraphy, and compare.

    python -m benchmarks.gpu.engines.compare BUNDLE --against CHECKPOINT [--layers] [--out DIR]

Needs a GPU, and an engine in fp16 or bf16. The graph is the one that the engine was compiled from,
in float32 on ONNX Runtime CPU. With --layers, Polygraphy compiles that graph once more with the
output of every layer marked, and compares layer by layer; the first that differs is where to look.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from exporter.bundle.staging import write_model
from exporter.bundle.weights_file import link_weights, stream_weights
from exporter.checks.verify import TOLERANCE, same_checkpoint
from exporter.decoder.trace import trace
from exporter.quantization.recipe import Recipe
from graphs.errors import MistralcError, UsageError
from graphs.manifest import Manifest, read_manifest
from graphs.passes.pipeline import lower

ROOT = Path(__file__).resolve().parents[3]
INPUTS = Path(__file__).with_name("inputs.py")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--against", required=True, metavar="CHECKPOINT")
    parser.add_argument("--layers", action="store_true", help="compare layer by layer")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "polygraphy")
    given = parser.parse_args()
    try:
        manifest = read_manifest(given.bundle)
        write_float32_graph(manifest, given.against, given.out)
        for command, dtype in commands(given.bundle, manifest, given.out, layers=given.layers):
            environment = {**os.environ, "MISTRALC_BUNDLE": str(given.bundle.resolve()),
                           "MISTRALC_DTYPE": dtype, "PYTHONPATH": str(ROOT),
                           **library(manifest)}  # fmt: skip
            code = subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode
            if code:
                return code
    except MistralcError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 1
    return 0


def write_float32_graph(manifest: Manifest, checkpoint: str, directory: Path) -> None:
    """Write the graph that the engine was compiled from, in float32, with its weights.

    Raises UsageError if the bundle holds no engine, or one with quantized weights.
    """
    build = manifest.build
    if not build.target.holds_plan or build.precision.quantized:
        raise UsageError(
            f"The bundle is for {build.target.name} in {build.precision.name}; expected an engine "
            "in fp16 or bf16, whose numbers a float32 graph can be compared with. Export one with "
            "--target rtx or --target tensorrt."
        )
    directory.mkdir(parents=True, exist_ok=True)
    build = replace(build, contract=replace(build.contract, activation="float32"))
    recipe = Recipe(spec=build.spec, activation="float32")
    stream_weights(same_checkpoint(checkpoint, manifest), recipe, directory)
    model = trace(build.spec, "float32")
    lower(model, build)
    link_weights(model, recipe, directory)
    write_model(model, directory)


def commands(
    bundle: Path, manifest: Manifest, directory: Path, *, layers: bool
) -> Iterator[tuple[list[str], str]]:
    """The commands to run in turn, each with the type of the caches in its inputs."""
    polygraphy = str(Path(sys.executable).with_name("polygraphy"))
    graph, outputs = str(directory / "model.onnx"), str(directory / "graph-outputs.json")
    inputs = ["--data-loader-script", str(INPUTS)]
    tolerance = str(TOLERANCE[manifest.activation])
    compared = ["--atol", tolerance, "--rtol", tolerance]
    if layers:
        marked = ["--onnx-outputs", "mark", "all", "--trt-outputs", "mark", "all"]
        yield (
            [polygraphy, "run", graph, "--onnxrt", "--trt", *marked, *inputs, *compared],
            "float32",
        )
        return
    yield [polygraphy, "run", graph, "--onnxrt", *inputs, "--save-outputs", outputs], "float32"
    plan = str(bundle / "engine.plan")
    yield ([polygraphy, "run", plan, "--model-type", "engine", "--trt", *inputs,
            "--load-outputs", outputs, *compared], manifest.activation)  # fmt: skip


def library(manifest: Manifest) -> dict[str, str]:
    """What makes Polygraphy import the library that the engine is for."""
    module = manifest.build.target.backend_module
    return {"POLYGRAPHY_USE_TENSORRT_RTX": "1"} if module == "tensorrt_rtx" else {}


if __name__ == "__main__":
    sys.exit(main())
