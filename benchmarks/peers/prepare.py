"""Prepare SmolLM2 for `benchmarks.peers.compare` in each peer's format, all from the same GGUF.

    python -m benchmarks.peers.prepare FOLDER --peers-python PYTHON

Prints the progress of the tools that it runs. In FOLDER, `ours/` holds our bundles, `tables/` their
calibration tables, and `ours-window-64` a bundle with a window. `hf/` is the checkpoint dequantized
to float32, for transformers and for the model builder of onnxruntime-genai. `llama/` holds the
output of llama.cpp's own quantizer. `hf-64/`, its derivatives and `llama-64.gguf` have a sliding
window of 64. Existing files are not replaced.
"""

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
from safetensors.torch import save_file

from exporter.checkpoint.open import open_checkpoint
from exporter.tokenizer.read import read_tokenizer
from tests.support.make_checkpoint import hf_config

WINDOW = 64
LLAMA_TYPES = ("F16", "Q8_0", "Q4_0")  # besides Q4_1, the checkpoint itself
GENAI = {
    "int4": ("int4", ()),
    "int4-pruned": ("int4", ("prune_lm_head=true",)),
    "int8": ("int8", ()),
    "int8-pruned": ("int8", ("prune_lm_head=true",)),
}

CALIBRATED = {  # by name: options of `mistralc calibrate`
    "int4wo-gptq-128": ("--precision", "int4wo", "--method", "gptq", "--block", "128"),
    "int8wo-awq-gptq-128": ("--precision", "int8wo", "--method", "awq+gptq", "--block", "128"),
    "int8-smoothquant": ("--precision", "int8"),
    "int8-smoothquant-kept": ("--precision", "int8", "--keep-share", "0.1"),
}
OURS: dict[str, tuple[str, ...]] = {  # by bundle: options of `mistralc export`
    "fp32": ("--precision", "fp32"),
    "int4wo-exact": ("--precision", "int4wo"),
    "int4wo-gptq-128": ("--precision", "int4wo", "--head-block", "64"),
    "int4wo-gptq-128-head4": ("--precision", "int4wo", "--head-bits", "4"),
    "int8wo-32": ("--precision", "int8wo"),
    "int8wo-awq-gptq-128": ("--precision", "int8wo", "--head-block", "64"),
    "int8-smoothquant": ("--precision", "int8", "--head-block", "64"),
    "int8-smoothquant-kept": ("--precision", "int8", "--head-block", "64"),
}

QUANTIZE = """
import sys, llama_cpp
source, target, kind = sys.argv[1:]
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
params.allow_requantize = True
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), params))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--peers-python", default=sys.executable, help="Python with the peers installed"
    )
    arguments = parser.parse_args()
    prepare(arguments.folder, arguments.peers_python)


def prepare(folder: Path, python: str) -> None:
    """Create what is missing in `folder`; skip peers that `python` lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, window in (("hf", None), (f"hf-{WINDOW}", WINDOW)):
        if not (folder / name).exists():
            write_hf(folder / name, window)
    for name, options in CALIBRATED.items():
        _calibrate(folder / "tables" / name, options)
    for name, options in OURS.items():
        fitting = (known for known in CALIBRATED if name.startswith(known))
        table = max(fitting, key=len, default=None)
        given = () if table is None else ("--calibration", folder / "tables" / table)
        _export(folder / "ours" / name, *options, *given)
    _export(folder / f"ours-window-{WINDOW}", "--precision", "fp32", "--window", WINDOW)
    _llama(folder, python)
    for name, (precision, options) in GENAI.items():
        _genai(folder / "hf", folder / f"genai-{name}", precision, options, python)
    _genai(folder / f"hf-{WINDOW}", folder / f"genai-window-{WINDOW}", "fp32", (), python)


def write_hf(directory: Path, window: int | None) -> None:
    """Write SmolLM2 as a Hugging Face directory of a Mistral model in float32."""
    checkpoint = open_checkpoint("smollm2")
    spec = checkpoint.spec
    if window is not None:
        spec = replace(spec, layer_windows=(window,) * spec.num_hidden_layers)
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    weights = {name: checkpoint.tensor(name) for name in spec.weight_shapes()}
    save_file(weights, partial / "model.safetensors", {"format": "pt"})
    files = read_tokenizer(checkpoint.path)
    (partial / "tokenizer.json").write_text(files.tokenizer_json, encoding="utf-8")
    for name, content in (
        ("config.json", hf_config(spec)),
        ("tokenizer_config.json", files.tokenizer_config),
        ("generation_config.json", files.generation_config),
    ):
        (partial / name).write_text(json.dumps(content), encoding="utf-8")
    partial.rename(directory)


def _calibrate(table: Path, options: tuple[str, ...]) -> None:
    if not table.exists():
        table.parent.mkdir(exist_ok=True)
        _mistralc("calibrate", "smollm2", "-o", table, *options, "--samples", "16")


def _export(bundle: Path, *options: object) -> None:
    if not bundle.exists():
        bundle.parent.mkdir(exist_ok=True)
        # The comparison reports the loss, so the quality gate must not refuse it.
        _mistralc("export", "smollm2", "-o", bundle, *options, "--max-ppl-increase", "9")


def _mistralc(*arguments: object) -> None:
    command = [sys.executable, "-m", "mistralc", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=sys.stderr)


def _llama(folder: Path, python: str) -> None:
    if not _has(python, "llama_cpp"):
        return
    (folder / "llama").mkdir(exist_ok=True)
    source = folder / "llama" / "Q4_1.gguf"
    if not source.exists():
        shutil.copyfile(open_checkpoint("smollm2").path, source)
    for kind in LLAMA_TYPES:
        target = source.with_name(f"{kind}.gguf")
        if not target.exists():
            partial = target.with_suffix(".partial")
            subprocess.run([python, "-c", QUANTIZE, source, partial, kind], check=True,
                           stdout=sys.stderr)  # fmt: skip
            partial.rename(target)
    windowed = folder / f"llama-{WINDOW}.gguf"
    if not windowed.exists():
        _with_window(source.with_name("F16.gguf"), windowed)


def _with_window(source: Path, target: Path) -> None:
    """Copy a GGUF file and add a sliding window to its metadata."""
    partial, reader = target.with_suffix(".partial"), gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_sliding_window(WINDOW)
    for name, field in reader.fields.items():
        kind, *items = field.types
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), kind, items[-1] if items else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(target)


def _genai(
    source: Path, target: Path, precision: str, options: tuple[str, ...], python: str
) -> None:
    if target.exists() or not _has(python, "onnxruntime_genai"):
        return
    extra = [*options]
    if precision.startswith("int"):
        extra += ["accuracy_level=4", "block_size=32"]
    command: list[str | Path] = [
        python, "-m", "onnxruntime_genai.models.builder", "-m", source.name, "-i", source,
        "-o", target, "-p", precision, "-e", "cpu", "-c", target.with_name("cache"),
    ]  # fmt: skip
    if extra:
        command += ["--extra_options", *extra]
    subprocess.run(command, check=True, stdout=sys.stderr)


def _has(python: str, module: str) -> bool:
    found = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", found], check=False).returncode == 0


if __name__ == "__main__":
    main()
